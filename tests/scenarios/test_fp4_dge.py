"""fp4-dge (arXiv 2501.17116): results and gradients as its formulas have them, through all that torch.compile does."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from harness import ALL, FIRST, assert_close, assert_same, compile_eager, cosine, count, step
from models import BLOCK, MLP, Block, Llama, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

from quartet import Policy, SpecError, recipes
from quartet.kernels import reference
from quartet.kernels.reference.estimator import dge_slope
from quartet.kernels.reference.products.outliers import split_outliers, to_dense
from quartet.kernels.spec import QuantSpec
from quartet.passes import pipeline
from quartet.passes.find.canonicalize import canonicalize
from quartet.passes.find.find_matmuls import find_matmuls
from quartet.passes.plan.plan import plan
from quartet.passes.recipe.estimator import estimator
from quartet.passes.recipe.outliers import outliers
from quartet.passes.recipe.smooth_swiglu import smooth_swiglu

FP4, E4M3, E5M2 = (QuantSpec.parse(f"{e}/row fp32 amax nearest") for e in ("e2m1", "e4m3", "e5m2"))
RECIPE = recipes()["fp4-dge"]


def rounded(x, spec):
    codes, scales, _ = reference.quantize(x, spec)
    return reference.dequantize(codes, scales, spec)[:, : x.shape[1]]


def expected(x, w, e):
    """Y, gX and gW of the definition, in fp32; of X, W and E."""
    clipped, *rest = split_outliers(x, 0.99)
    rest = to_dense(*rest, x.shape[1])
    xq, wq = rounded(clipped, FP4), rounded(w, FP4)
    gw = dge_slope(w, FP4) * (rounded(e.t(), E5M2) @ rounded(xq.t(), E4M3).t())
    return xq @ wq.t() + rest @ w.t(), rounded(e, E5M2) @ rounded(wq.t(), E4M3).t(), gw + e.t() @ rest


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(96, 40, 24), (70, 33, 17)])
def test_one_layer_by_its_formulas(shape, bias):
    torch.manual_seed(0)
    m, k, n = shape
    layer = nn.Linear(k, n, bias)
    x, e = (torch.randn(m, k) ** 3).requires_grad_(), torch.randn(m, n)
    compiled, backend = compile_eager(layer, Policy(None).on("linear", "fp4-dge"))  # also what contracts few elements
    y = compiled(x)
    y.backward(e)
    assert backend.lowered() == {"weight": ALL} and count(backend.forwards()[0], "split_outliers") == 1
    with torch.no_grad():
        want_y, want_gx, want_gw = expected(x.detach(), layer.weight, e)
        torch.testing.assert_close(y, want_y + (layer.bias if bias else 0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(x.grad, want_gx, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.weight.grad, want_gw, rtol=1e-3, atol=1e-3)


def unquantized(monkeypatch, *passes):
    monkeypatch.setattr(pipeline, "PASSES", (canonicalize, find_matmuls, plan, *passes))


@pytest.mark.parametrize("orientation", ["linear", "matmul"])
def test_splitting_alone_leaves_function_and_gradients(monkeypatch, orientation):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(24, 40) / 6), nn.Parameter(torch.randn(24))

        def forward(self, x):
            if orientation == "linear":
                return F.linear(x, self.weight, self.bias)
            return x @ self.weight.t().contiguous() + self.bias

    unquantized(monkeypatch, outliers)
    torch.manual_seed(0)
    model, inputs = Model(), [(torch.randn(3, 50, 40) ** 3).requires_grad_()]
    compiled, backend = compile_eager(model, "fp4-dge")
    got, want = step(compiled, model, inputs), step(model, model, inputs)
    assert backend.count("split_outliers") == 1 and backend.count("sparse_mm") == 2
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("roles", [ALL, {"fprop"}, {"fprop", "dgrad"}, {"fprop", "wgrad"}, {"dgrad"}, {"wgrad"}])
@pytest.mark.parametrize("smooth", ["none", "channel", "token"])
def test_estimator_alone_multiplies_the_gradient(monkeypatch, roles, smooth):
    """Whichever products are quantised, beside Smooth-SwiGLU and outliers."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.Linear(40, 24)

        def forward(self, a, b):
            return self.down(F.silu(a) * b)

    unquantized(monkeypatch, smooth_swiglu, outliers, estimator)
    torch.manual_seed(0)
    model, inputs = Gated(), [torch.randn(100, 40, requires_grad=True) for _ in range(2)]
    base = replace(recipes()["fp8-rowwise"], name="all", fprop=RECIPE.fprop, smooth=smooth, estimator="dge",
                   outliers=0.99)
    policy = Policy(None)
    for role in roles:
        policy = policy.on("down", base, role=role)
    compiled, backend = compile_eager(model, policy)
    got, want = step(compiled, model, inputs), step(model, model, inputs)
    assert backend.count("dge") == ("fprop" in roles)
    if "fprop" in roles:
        # What is smoothed by channels is another weight, with other slopes.
        assert backend.count("split_outliers") == 1
        x = (F.silu(inputs[0]) * inputs[1]).detach()
        rest = torch.zeros_like(x)
        if smooth == "none" and "wgrad" in roles:
            rest = to_dense(*split_outliers(x, 0.99)[1:], 40)
        e = 2 * model(*inputs).detach() / 2400
        slope = dge_slope(model.down.weight.detach(), FP4)
        if smooth == "none" or "wgrad" not in roles and smooth == "token":
            want[1]["down.weight"] = slope * (e.t() @ (x - rest)) + e.t() @ rest
        else:
            del got[1]["down.weight"], want[1]["down.weight"]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)


def aligned(model, got, plain):
    """Cosine of each weight's gradient with the plain one under its slope; of all others with the plain one."""
    out = {}
    for name, grad in got[1].items():
        parameter = dict(model.named_parameters()).get(name)
        want = plain[1][name]
        if parameter is not None and parameter.dim() == 2 and "embed" not in name and "head" not in name:
            want = want * dge_slope(parameter.detach(), FP4)
        out[name] = cosine(grad, want)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_a_block(dtype):
    torch.manual_seed(0)
    model, inputs = Block().to(dtype), [torch.randn(2, 20, 64, dtype=dtype, requires_grad=True)]
    compiled, backend = compile_eager(model, "fp4-dge")
    got = step(compiled, model, inputs)
    found = aligned(model, got, step(model, model, inputs))
    assert min(found.values()) > 0.9, found
    assert backend.lowered() == {name.removeprefix("layers.0."): ALL for name in BLOCK}
    assert backend.count("split_outliers") == 4, "q, k and v share one, gate and up another"


def test_autocast():
    torch.manual_seed(0)
    model, x = MLP(), torch.randn(40, 64)

    def run(x, call=model):
        with torch.autocast("cpu", torch.bfloat16):
            return call(x)

    compiled, backend = compile_eager(model, "fp4-dge")
    got = step(lambda x: run(x, compiled), model, [x])
    assert backend.lowered() == {"up": FIRST, "down": ALL}
    assert min(aligned(model, got, step(run, model, [x])).values()) > 0.9


def test_symbolic_tokens():
    torch.manual_seed(0)
    model = MLP()
    policy = Policy(None).on("linear", "fp4-dge")
    dynamic, backend = compile_eager(model, policy, dynamic=True)
    for n in (40, 24, 7):
        inputs = [torch.randn(n, 64, requires_grad=True)]
        got = step(dynamic, model, inputs)
        static, _ = compile_eager(model, policy, dynamic=False)
        torch.testing.assert_close(got, step(static, model, inputs), rtol=1e-5, atol=1e-7)
    assert backend.calls == 1


def test_outliers_are_what_it_keeps_of_x():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(64, 128, bias=False), nn.Linear(128, 64, bias=False)

        def forward(self, x):
            return self.down(self.up(x))

    model = Two()
    compiled, backend = compile_eager(model, "fp4-dge")
    step(compiled, model, [torch.randn(100, 64)])
    forward, = backend.forwards()
    kept = [n.meta["val"] for n in forward.graph.output_node().args[0][1:] if n.op == "call_function"]
    assert max(t.numel() * t.element_size() for t in kept) <= 100 * 128 // 2, [(t.shape, t.dtype) for t in kept]
    room = 2 * (100 * 128 // 100)
    assert {t.dtype for t in kept if t.numel() == room} == {torch.float32, torch.int32}


@pytest.mark.parametrize("kernels", [(), ("inductor",)])
def test_under_activation_checkpointing(kernels):
    class Checkpointed(MLP):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    torch.manual_seed(0)
    plain, model = MLP(), Checkpointed()
    model.load_state_dict(plain.state_dict())
    inputs = [torch.randn(40, 64, requires_grad=True)]
    want = step(compile_eager(plain, "fp4-dge", disable_kernels=kernels)[0], plain, inputs)
    compiled, backend = compile_eager(model, "fp4-dge", disable_kernels=kernels)
    assert_same(step(compiled, model, inputs), want)
    assert count(backend.backwards()[0], "split_outliers") == 2, "the forward is computed again"


@pytest.mark.parametrize("recipe", ["fp4-dge", "tetrajet-ema"])
def test_training(recipe):
    torch.manual_seed(0)
    model = Llama()
    compiled, _ = compile_eager(model, recipe)
    optimizer, losses = torch.optim.AdamW(model.parameters(), 3e-3), []
    inputs = tokens()
    for number in range(40):
        losses.append(step(compiled, model, inputs, number)[0].item())
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0], losses


def test_an_outlier_takes_the_signal_only_where_it_stays():
    """One token in which every element is large: under one bound for the tensor it is cut, and added back exactly."""
    torch.manual_seed(0)
    layer, x = nn.Linear(256, 64, bias=False), torch.randn(200, 256)
    x[:, 3] *= 60
    error = {}
    for name, quantile in (("kept", None), ("apart", 0.99)):
        compiled, _ = compile_eager(layer, replace(RECIPE, name=name, outliers=quantile))
        with torch.no_grad():
            error[name] = ((compiled(x) - layer(x)).norm() / layer(x).norm()).item()
    others = torch.arange(256) != 3
    assert error["apart"] < 0.2 * (x[:, others] @ layer.weight[:, others].t()).norm() / layer(x).norm()
    assert error["kept"] > 3 * error["apart"], error


def test_inference():
    model, x = MLP(), torch.randn(40, 64)
    compiled, backend = compile_eager(model, "fp4-dge")
    with torch.no_grad():
        got = compiled(x)
    assert cosine(got, model(x).detach()) > 0.97 and backend.count("dge") == 0 and backend.count("split_outliers") == 2


def test_a_pass_can_be_left_out():
    model, inputs = MLP(), [torch.randn(40, 64)]
    compiled, backend = compile_eager(model, "fp4-dge", disable_passes=["outliers", "estimator"])
    plain, _ = compile_eager(model, replace(RECIPE, name="plain", outliers=None, estimator="straight-through"))
    assert_same(step(compiled, model, inputs), step(plain, model, inputs))
    assert backend.count("dge") == backend.count("split_outliers") == 0


def test_batches_are_left_as_they_are():
    class Batched(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 24, 40) / 6)

        def forward(self, x):
            return torch.bmm(x, self.weight.transpose(1, 2))

    model, inputs = Batched(), [torch.randn(3, 50, 40, requires_grad=True)]
    compiled, backend = compile_eager(model, replace(RECIPE, name="all", skip=()))
    assert_close(step(compiled, model, inputs), step(model, model, inputs), 0.9)
    notes = {r.role: r.notes for r in backend.records}
    assert "outliers stay: X is not one matrix" in notes["fprop"] and notes["wgrad"] == (
        "straight through: W is not one matrix",)


def test_impossible_recipes_are_refused():
    with pytest.raises(SpecError, match="'ste'.*straight-through, dge"):
        replace(RECIPE, name="x", estimator="ste")
    for quantile in (0.5, 1.0, 0.99999, 1, "0.99"):
        with pytest.raises(SpecError, match="such as 0.99"):
            replace(RECIPE, name="x", outliers=quantile)
    for base in ("fp8", "nvfp4"):
        with pytest.raises(SpecError, match="needs W of fprop in e2m1, to nearest"):
            replace(recipes()[base], name="x", estimator="dge")
    with pytest.raises(SpecError, match="leave out the rotation"):
        replace(recipes()["quartet"], name="x", estimator="dge")


def test_options_are_data():
    changed = [replace(RECIPE, name="r", **c) for c in ({}, {"outliers": 0.98}, {"outliers": None},
                                                        {"estimator": "straight-through"})]
    policies = [Policy(recipe) for recipe in changed]
    assert len({p.digest() for p in policies}) == len(policies)
    assert all(Policy.from_toml(p.to_toml()) == p for p in policies)
    assert "outliers = 0.99" in policies[0].to_toml() and 'estimator = "dge"' in policies[0].to_toml()
