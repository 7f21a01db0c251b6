"""Statistics that a compiled step records, against those of the same tensors outside of the graph."""

import copy
import math

import pytest
import torch
from gated import Gated, data
from harness import compile_eager, step
from torch import nn
from torch.utils.checkpoint import checkpoint

import quartet
from quartet import Policy
from quartet.inspect import Inspector
from quartet.kernels import reference
from quartet.kernels.reference import statistics as definition
from quartet.recipes import recipes
from quartet.runtime.inspect.clock import CLOCK


class Checkpointed(Gated):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


def one_step(model, policy, inspector, **options):
    compiled, backend = compile_eager(model, policy, inspect=inspector, **options)
    return step(compiled, model, data()), backend


def record(statistics, layer, role, operand="", recipe=""):
    found, = (r for r in statistics if (r.layer, r.role, r.operand, r.recipe) == (layer, role, operand, recipe))
    return found


def assert_is(found, values):
    for name, wanted in zip(definition.COLUMNS, values.tolist(), strict=False):
        got = found.values[name]
        assert got == pytest.approx(wanted, rel=1e-6) or math.isnan(got) and math.isnan(wanted), (found.name, name)
    bins = {definition.LOWEST + k: n for k, n in enumerate(values[len(definition.COLUMNS):].tolist()) if n}
    assert found.scales == bins


@pytest.mark.parametrize("name", ["quartet", "fp8", "fp8-rowwise", "fp8-block", "mxfp8", "tetrajet", "int8"])
def test_operands_of_forward_are_those_of_the_reference(name):
    model, inspector, recipe = Gated(), Inspector(every=1), recipes()[name]
    one_step(model, name, inspector)
    statistics = inspector.statistics()
    for operand, tensor, gemm in (("x", data()[0], recipe.fprop.a), ("w", model.up.weight, recipe.fprop.b)):
        tensor, rotation = tensor.detach(), recipe.fprop.rotation
        if rotation is not None:
            tensor = reference.hadamard(tensor, rotation.n, torch.tensor(rotation.signs))
        assert_is(record(statistics, "up", "fprop", operand), definition.operand_statistics(tensor, gemm.spec))


def test_gradients_are_compared_with_the_unquantised_product():
    model, inspector = Gated(), Inspector(every=1)
    kept = {}
    (_, grads), _ = one_step(model, "fp8-rowwise", inspector)
    plain = copy.deepcopy(model)
    plain.down.register_full_backward_hook(lambda module, of_input, of_output: kept.update(e=of_output[0]))
    plain.down.register_forward_hook(lambda module, inputs, out: kept.update(x=inputs[0].detach()))
    step(plain, plain, data())
    columns = torch.arange(64) * 96 // 64
    exact = kept["e"].t() @ kept["x"]
    found = record(inspector.statistics(), "down", "wgrad")
    got, wanted = grads["down.weight"][:, columns], exact[:, columns]
    # X and E of the quantised step differ from those of the plain one by what the layers before have rounded
    assert found.values["cosine"] == pytest.approx(float(definition.cosine(got, wanted)), abs=2e-3)
    assert 0 < found.values["error"] < 0.01 and found.values["cosine"] > 0.995


def test_dgrad_is_compared_exactly():
    layer, inspector = nn.Linear(64, 96, bias=False), Inspector(every=1)
    x, e = data()[0], torch.randn(128, 96)
    compiled, _ = compile_eager(layer, "quartet", inspect=inspector)
    compiled(x).backward(e)
    exact_of_x, exact_of_w = e @ layer.weight.detach(), e.t() @ x.detach()
    for role, got, exact in (("dgrad", x.grad, exact_of_x), ("wgrad", layer.weight.grad, exact_of_w)):
        found = record(inspector.statistics(), "weight", role)
        assert found.values["cosine"] == pytest.approx(float(definition.cosine(got, exact)), rel=1e-6)
        assert found.values["error"] == pytest.approx(float(definition.relative_error(got, exact)), rel=1e-4)


@pytest.mark.parametrize("policy", ["quartet", "fp8-delayed", "nvfp4", "quartet2", "fp8-trillion"])
def test_nothing_changes_but_what_is_recorded(policy):
    model = Gated()
    twin = copy.deepcopy(model)
    compiled, _ = compile_eager(twin, Policy(policy).on("*", policy))
    plain = [step(compiled, twin, data(), seed) for seed in range(2)]
    compiled, _ = compile_eager(model, Policy(policy).on("*", policy), inspect=Inspector(1, ["mxfp8"]), check="finite")
    watched = [step(compiled, model, data(), seed) for seed in range(2)]
    for a, b in zip(plain, watched, strict=True):
        assert torch.equal(a[0], b[0]) and all(torch.equal(a[1][name], b[1][name]) for name in a[1])


NAME = """a "layer" of 100 %22 \\ it's"""


@pytest.mark.parametrize("policy", ["quartet", "fp8-delayed", "tetrajet-ema"])
def test_no_op_is_given_text_that_inductors_cpp_would_have_to_escape(policy):
    """Its C++ wrapper does not (PyTorch 2.13), and what it writes does not compile."""
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleDict({NAME: nn.Linear(64, 64), "last": nn.Linear(64, 64)})

        def forward(self, x):
            return self.layers["last"](self.layers[NAME](x).relu())

    model, inspector = Named(), Inspector(1, ["mxfp8"])
    compiled, backend = compile_eager(model, policy, inspect=inspector, check="finite")
    step(compiled, model, [torch.randn(32, 64)])
    texts = [text for gm in backend.capture.graphs for node in gm.graph.nodes if node.op == "call_function"
             and str(node.target).startswith("quartet") for text in node.args if isinstance(text, str)]
    assert texts and not any({'"', "\\", "\n"} & set(text) for text in texts), texts
    assert f"layers.{NAME}" in {r.layer for r in inspector.statistics()}


def test_recomputation_is_recorded_once():
    model, inspector = Gated(), Inspector(every=1)
    twin, other = Checkpointed(), Inspector(every=1)
    twin.load_state_dict(model.state_dict())
    one_step(model, "fp8", inspector)
    _, backend = one_step(twin, "fp8", other)
    plain, recomputed = inspector.statistics(), other.statistics()
    assert sorted(r.name for r in plain) == sorted(r.name for r in recomputed)
    assert {r.name: str(r.values) for r in plain if r.role == "fprop"} == {
        r.name: str(r.values) for r in recomputed if r.role == "fprop"}


def test_steps_are_those_of_the_optimizer_and_micro_batches_count_once(monkeypatch):
    model, inspector = nn.Linear(32, 32), Inspector(every=2)
    compiled, backend = compile_eager(model, "fp8", inspect=inspector)
    optimizer, another = (torch.optim.SGD(one.parameters(), 0.1) for one in (model, nn.Linear(2, 2)))
    for _ in range(5):
        for _ in range(3):
            compiled(torch.randn(32, 32)).square().mean().backward()
        optimizer.step()
        CLOCK.now()  # as where another model is inspected
        another.step()
    found = inspector.statistics().where(layer="weight", role="wgrad", operand="e")
    assert [r.step for r in found] == [0, 2, 4] and backend.calls == 1
    inspector.every = 3
    for _ in range(4):
        compiled(torch.randn(32, 32)).square().mean().backward()
        optimizer.step()
    assert backend.calls == 1, "another interval compiles nothing"
    assert inspector.statistics().steps[-1] == 6
    targets = {str(node.target) for gm in backend.capture.graphs for node in gm.graph.nodes}
    assert "quartet.observe.default" in targets and not any("_local_scalar_dense" in name for name in targets)
    monkeypatch.setattr("quartet.runtime.inspect.observe.parsed", lambda program: pytest.fail("nothing is due now"))
    inspector.every = 1000
    for _ in range(2):
        compiled(torch.randn(32, 32)).square().mean().backward()
        optimizer.step()


def test_what_if_is_what_the_recipe_would_have_done():
    """Deterministic operands: under what-if of another recipe, and of the model's own under that recipe."""
    model, beside, own = Gated(), Inspector(1, ["fp8-rowwise", "quartet"]), Inspector(1)
    one_step(model, "bf16", beside)
    torch._dynamo.reset()
    one_step(model, "fp8-rowwise", own)
    own, beside = own.statistics(), beside.statistics()
    for layer, role, operand in (("up", "fprop", "x"), ("up", "fprop", "w"), ("gate", "dgrad", "w"),
                                 ("up", "wgrad", "x")):
        wanted = record(own, layer, role, operand).values["error"]
        assert record(beside, layer, role, operand, "fp8-rowwise").values["error"] == pytest.approx(wanted, rel=1e-6)
    saved = record(beside, "up", "dgrad", "w", "quartet").values["error"]
    assert saved > record(beside, "up", "fprop", "w", "quartet").values["error"], "it starts from forward's codes"


def test_what_if_of_operands_that_several_recipes_share_with_graphs_that_quantise():
    inspector = Inspector(1, ["fp8", "quartet", "mxfp8"])
    one_step(Gated(), "fp8", inspector)
    statistics = inspector.statistics()
    for operand in "xw":
        assert record(statistics, "up", "fprop", operand, "fp8").values["error"] == pytest.approx(
            record(statistics, "up", "fprop", operand).values["error"], rel=1e-6)
    assert "mxfp8" in statistics.what_if() and "up dgrad" in statistics.what_if()


def test_the_weights_of_a_gated_layer():
    model, inspector = Gated(), Inspector(1)
    with torch.no_grad():
        model.up.weight[:3] = model.gate.weight[:3]
    one_step(model, "quartet", inspector)
    found, = inspector.statistics().where(kind="alignment")
    mean, largest = definition.alignment(model.gate.weight, model.up.weight).tolist()
    assert found.values == {"mean": pytest.approx(mean), "largest": pytest.approx(largest)}
    assert largest == pytest.approx(1.0) and found.layer == "gate and up"


def test_layers_that_one_graph_serves_are_told_apart():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Gated() for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    model, inspector = Stack(), Inspector(1)
    with torch.no_grad():
        for scale, layer in enumerate(model.layers, 1):
            layer.down.weight.mul_(scale)
    whole = {n: p.detach().abs().max().item() for n, p in model.named_parameters() if n.endswith("down.weight")}
    from harness import eager_backend

    backend = eager_backend("fp8", inspect=inspector)
    for layer in model.layers:
        layer.compile(backend=backend)
    step(model, model, data())
    found = {r.layer: r.values["amax"] for r in inspector.statistics() if (r.role, r.operand) == ("fprop", "w")}
    for name, amax in whole.items():
        assert found[name.removesuffix(".weight")] == pytest.approx(amax), name


def test_layers_that_a_graph_has_several_times_are_told_apart():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.scale = nn.Linear(64, 64), nn.Parameter(torch.ones(()))

        def forward(self, x):
            y = self.layer(3 * self.layer(x))
            return (y @ (y * self.scale).t()) @ y

    inspector = Inspector(1)
    one_step(Twice(), Policy("fp8").on("bmm", "fp8"), inspector, check="finite")
    statistics = inspector.statistics()
    assert [record(statistics, name, "fprop", "x").values["amax"] for name in ("layer", "layer (2)")][0] == (
        pytest.approx(data()[0].abs().max().item()))
    layers = {r.layer for r in statistics}
    assert layers == {"layer", "layer (2)"} | {name for name in layers if "bmm" in name} and len(layers) == 4
    assert len({(r.kind, r.name) for r in statistics}) == len(statistics)


def test_explaining_records_nothing():
    inspector = Inspector(1)
    quartet.explain(Gated(), *data(), options={"policy": "fp8", "inspect": inspector})
    assert len(inspector.statistics()) == 0


@pytest.mark.parametrize("given, message", [(0, "1 or more"), ("often", "every how many"), (2.5, "every how many")])
def test_options_that_cannot_be(given, message):
    from quartet.options import OptionError, Options

    with pytest.raises(OptionError, match=message):
        Options.parse(None, {"inspect": given})


def test_one_recipe_of_what_if_needs_no_list():
    assert Inspector(what_if="fp8").recipes == Inspector(what_if=["fp8"]).recipes


@pytest.mark.parametrize("recipe, message", [("e4m3/16", "quantise products"), ("halo-fp8-2", "transforms rows"),
                                             ("fp4-dge", "outliers apart"), ("fp9", "did you mean")])
def test_what_if_that_cannot_be_told(recipe, message):
    with pytest.raises(ValueError, match=message):
        Inspector(what_if=[recipe])
