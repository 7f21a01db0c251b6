"""The pass that writes convolutions as matrix products: exact by itself, and what it leaves alone is said."""

import pytest
import torch
from harness import ALL, FIRST, assert_close, compile_eager, cosine, count, step
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils.checkpoint import checkpoint

from quartet.kernels.spec import QuantSpec
from quartet.lowering.recipe.types import Gemm, Operand, Recipe
from quartet.model.names import names_of
from quartet.passes.compilation import Compilation
from quartet.passes.find.canonicalize import canonicalize
from quartet.passes.find.unfold import unfold
from quartet.passes.state import State
from quartet.policy import Policy
from quartet.runtime.capture import Capture
from quartet.runtime.compat import CustomGraphPass, compile_fx

aten = torch.ops.aten
QUARTET = Policy(None).on("conv", "quartet")
SHAPES = {1: (2, 4, 19), 2: (2, 4, 17, 13), 3: (2, 4, 9, 8, 7)}
KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
FORMS = (
    dict(kernel_size=1), dict(kernel_size=1, stride=2, bias=False), dict(kernel_size=3, padding=1),
    dict(kernel_size=3, stride=2, padding=1, bias=False), dict(kernel_size=3, padding=2, dilation=2),
    dict(kernel_size=3, stride=2, padding=3, dilation=3), dict(kernel_size=2, stride=2),
    dict(kernel_size=4, stride=4, bias=False), dict(kernel_size=5, stride=3, padding=2), dict(kernel_size=1, padding=1),
    dict(kernel_size=2, stride=3),
)


def from_original(spec):
    """The three GEMMs with both operands quantised from the original tensors."""
    operand = Operand(QuantSpec.parse(spec))
    gemm = Gemm(operand, operand)
    return Recipe("from-original", fprop=gemm, dgrad=gemm, wgrad=gemm)


MXFP8 = from_original("e4m3/32 e8m0 ceil nearest")


class Unfolder(CustomGraphPass):
    """``unfold`` alone, as a joint graph pass; ``counts`` says what it made."""

    def __init__(self, gm, inputs):
        self.config = Compilation(QUARTET, weights=names_of(gm, inputs).weights)
        self.left = None

    def __call__(self, graph):
        state = State(graph.owning_module, self.config)
        canonicalize(state)
        unfold(state)
        self.left = sum("aten.convolution" in str(n.target) for n in graph.nodes)

    def uuid(self):
        return None


def unfolded(model, **kwargs):
    """The model compiled with convolutions as matrix products, nothing quantised; and the passes that ran."""
    passes = []

    def backend(gm, inputs):
        passes.append(Unfolder(gm, inputs))
        return compile_fx(gm, inputs, inner_compile=Capture(), config_patches={"joint_custom_pre_pass": passes[-1]})

    torch._dynamo.reset()
    return torch.compile(model, backend=backend, **kwargs), passes


def inputs_of(rank, grad=True, batch=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, *SHAPES[rank][1:], generator=generator).to(dtype).requires_grad_(grad)


def assert_exact(a, b, **tolerance):
    torch.testing.assert_close(a[0], b[0], **tolerance)
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        torch.testing.assert_close(a[1][name], b[1][name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("rank", KINDS)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_unfolding_is_exact(rank, form):
    torch.manual_seed(0)
    model = nn.Sequential(KINDS[rank](4, 6, **form), nn.Tanh())
    run, passes = unfolded(model, fullgraph=True)
    x = inputs_of(rank)
    assert_exact(step(run, model, (x,)), step(model, model, (x,)), rtol=1e-5, atol=2e-6)
    assert [p.left for p in passes] == [0]
    given = x.detach()
    plain = model(given)
    torch.testing.assert_close(run(given), plain)
    assert run(given).stride() == plain.stride()


def test_a_kernel_size_for_each_axis():
    model = nn.Conv2d(4, 6, (3, 2), (2, 1), (0, 1), (1, 2))
    run, passes = unfolded(model)
    x = inputs_of(2)
    assert_exact(step(run, model, (x,)), step(model, model, (x,)), rtol=1e-5, atol=2e-6)
    assert passes[0].left == 0


def test_same_padding_and_reflection_are_unfolded_after_their_pad():
    for settings in (dict(padding="same"), dict(padding=1, padding_mode="reflect")):
        model = nn.Conv2d(4, 6, 3, **settings)
        run, passes = unfolded(model)
        x = inputs_of(2)
        assert_exact(step(run, model, (x,)), step(model, model, (x,)), rtol=1e-5, atol=2e-6)
        assert passes[0].left == 0


@pytest.mark.parametrize("train", ("weight", "bias", "input"))
def test_only_what_requires_a_gradient_gets_one(train):
    model, x = nn.Conv2d(4, 6, 3, padding=1), inputs_of(2, grad=train == "input")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == train)
    run, passes = unfolded(model)
    ours, plain = step(run, model, (x,)), step(model, model, (x,))
    assert set(ours[1]) == {"input0" if train == "input" else train}
    assert_exact(ours, plain, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("form", (FORMS[0], FORMS[3]), ids=str)
def test_channels_last_stays_channels_last(form):
    model = nn.Sequential(nn.Conv2d(4, 6, **form), nn.ReLU(), nn.Conv2d(6, 8, 1)).to(memory_format=torch.channels_last)
    x = inputs_of(2).detach().to(memory_format=torch.channels_last).requires_grad_()
    run, passes = unfolded(model)
    assert run(x).stride() == model(x).stride() and run(x).is_contiguous(memory_format=torch.channels_last)
    assert_exact(step(run, model, (x,)), step(model, model, (x,)), rtol=1e-5, atol=2e-6)
    assert passes[0].left == 0


def test_bf16_sums_the_taps_in_fp32():
    model, x = nn.Conv2d(4, 6, 5, padding=2).bfloat16(), inputs_of(2, dtype=torch.bfloat16)
    run, passes = unfolded(model)
    exact = nn.Conv2d(4, 6, 5, padding=2)
    exact.load_state_dict(model.state_dict())
    ours, plain = step(run, model, (x,)), step(exact, exact, (x.detach().float().requires_grad_(),))
    for name, gradient in plain[1].items():
        assert (ours[1][name] - gradient).norm() < 0.01 * gradient.norm(), name


def test_under_autocast_and_checkpointing():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 4, 1))

    def forward(x):
        with torch.autocast("cpu", torch.bfloat16):
            return checkpoint(model, x, use_reentrant=False)

    x = inputs_of(2)
    run, backend = compile_eager(forward, Policy(None).on("conv", MXFP8))
    assert_close(step(run, model, (x,)), step(forward, model, (x,)), 0.99)
    assert backend.lowered() == {"0": ALL, "2": ALL}
    assert {r.dtype for r in backend.records} == {"bfloat16"}


def test_the_batch_may_be_symbolic():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 1))
    run, backend = compile_eager(model, QUARTET)
    for batch in (2, 5, 7):
        x = inputs_of(2, batch=batch)
        torch._dynamo.mark_dynamic(x, 0)
        assert_close(step(run, model, (x,)), step(model, model, (x,)), 0.6)
    assert backend.calls == 1
    assert backend.lowered() == {"0": ALL, "2": ALL}
    assert all("s" in str(r.m) for r in backend.records if r.role == "fprop")


def test_a_symbolic_image_is_left_alone():
    model = nn.Conv2d(4, 6, 3, padding=1)
    run, backend = compile_eager(model, QUARTET, dynamic=True)
    x = inputs_of(2)
    assert_exact(step(run, model, (x,)), step(model, model, (x,)))
    assert backend.alone() == {"": ALL} or backend.alone() == {"weight": ALL}
    assert all("only the batch can be of symbolic size" in r.reason for r in backend.records)


@pytest.mark.parametrize("make, shape, reason", (
    (lambda: nn.Conv2d(4, 8, 3, groups=2), (2, 4, 9, 9), "2 groups"),
    (lambda: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 9, 9), "4 groups"),
    (lambda: nn.ConvTranspose2d(4, 8, 3), (2, 4, 9, 9), "transposed"),
    (lambda: nn.Conv2d(4, 8, 3).double(), (2, 4, 9, 9), "operands are torch.float64"),
    (lambda: nn.Conv2d(4, 8, 3), (0, 4, 9, 9), "a size is zero"),
))
def test_what_is_no_product_is_left_alone_with_its_reason(make, shape, reason):
    model = nn.Sequential(make())
    dtype = next(model.parameters()).dtype
    x = torch.randn(shape, dtype=dtype).requires_grad_()
    run, backend = compile_eager(model, QUARTET)
    assert_exact(step(run, model, (x,)), step(model, model, (x,)), equal_nan=True)
    assert backend.alone() == {"0": ALL} and not backend.lowered()
    assert all(reason in r.reason and r.op_class == "conv" for r in backend.records)


def test_strict_refuses_what_the_policy_names_and_cannot_have():
    run, _ = compile_eager(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)), QUARTET, strict=True)
    with pytest.raises(BackendCompilerFailed,
                       match=r"UnsupportedMatmul: .*convolution 0 \(m=98 n=4 k=9, torch.float32\).*4 groups"):
        run(inputs_of(2).detach()[..., :9, :9])
    run, _ = compile_eager(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)), Policy("quartet"), strict=True)
    run(inputs_of(2).detach())


def test_a_kernel_that_is_data_is_left_alone():
    class Dynamic(nn.Module):
        def __init__(self):
            super().__init__()
            self.make = nn.Linear(5, 6 * 4 * 9)

        def forward(self, x, z):
            return nn.functional.conv2d(x, self.make(z).view(6, 4, 3, 3))

    model = Dynamic()
    run, backend = compile_eager(model, QUARTET)
    inputs = inputs_of(2), torch.randn(5)
    assert_exact(step(run, model, inputs), step(model, model, inputs))
    assert {r.reason for r in backend.records if r.op_class == "conv"} == {"its kernel is no parameter, or its input "
                                                                          "is one"}


def test_the_policy_decides_by_name_shape_and_role():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 1), nn.Conv2d(8, 8, 1))
    policy = Policy("quartet").on("2", "quartet", op="conv", role="fprop").on("conv", MXFP8, shape="k > 20")
    run, backend = compile_eager(model, policy)
    step(run, model, (inputs_of(2),))
    assert backend.lowered() == {"0": ALL, "2": frozenset({"fprop"})}
    left = {(r.fqn, r.role): r.reason for r in backend.records if not r.lowered}
    default = "recipe 'quartet' leaves conv in high precision unless a rule names it"
    assert left == {("2", "dgrad"): default, ("2", "wgrad"): default,
                    **{("3", role): default for role in ("fprop", "dgrad", "wgrad")}}


def test_auto_unfolds_only_what_a_rule_names():
    everything = Recipe("everything", fprop=MXFP8.fprop, dgrad=MXFP8.dgrad, wgrad=MXFP8.wgrad, skip=())
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, 1))
    policy = Policy(everything, where_it_pays=True).on("1", everything, op="conv")
    run, backend = compile_eager(model, policy)
    step(run, model, (inputs_of(2),))
    assert backend.lowered() == {"1": ALL}
    assert {r.reason for r in backend.records if r.fqn == "0"} == {"it is not known to pay: name it in a rule"}


def test_records_are_those_of_the_product():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1))
    run, backend = compile_eager(model, QUARTET)
    step(run, model, (inputs_of(2, grad=False),))
    fprop, wgrad = backend.records
    assert (fprop.m, fprop.n, fprop.k, wgrad.m, wgrad.n, wgrad.k) == (126, 6, 36, 6, 36, 126)
    assert fprop.op_class == wgrad.op_class == "conv" and fprop.recipe == "quartet"
    assert fprop.notes[0] == "unfolded: 2.57× the input"
    assert backend.lowered() == {"0": FIRST}


def test_a_kernel_used_twice_is_two_sites_and_one_gradient():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(conv, nn.Tanh(), conv)
    run, backend = compile_eager(model, Policy(None).on("conv", MXFP8))
    x = inputs_of(2)
    assert_close(step(run, model, (x,)), step(model, model, (x,)), 0.99)
    assert sum(r.role == "fprop" and r.lowered for r in backend.records) == 2


def saved(model, x, policy):
    torch._dynamo.reset()
    run, backend = compile_eager(model, policy)
    run(x)
    return backend.capture.saved_bytes


def test_columns_are_not_kept_for_backward():
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.Tanh(),
                          nn.Conv2d(16, 16, 3, padding=1, bias=False)).bfloat16()
    x = torch.randn(4, 16, 16, 16, dtype=torch.bfloat16)
    image = x.numel() * 2
    plain = saved(model, x, Policy("bf16"))
    assert plain == 2 * image  # of the output and tanh's, which the second convolution keeps
    assert saved(model, x, Policy(None).on("conv", MXFP8)) == plain
    weight = 16 * 160
    for recipe, further in (("quartet", 4 * 32), ("quartet-paper", 2 * weight // 8)):  # signs; clip masks of W
        packed = saved(model, x, Policy(None).on("conv", recipe))
        assert packed == plain + weight * 17 // 32 + further + 8, "codes and scales of W, and the seed"


def test_backward_runs_no_forward_product_again():
    layers = [layer for _ in range(3) for layer in (nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8),
                                                    nn.ReLU())]
    run, backend = compile_eager(nn.Sequential(*layers), Policy(None).on("conv", "quartet"), disable_kernels=["cpp"])
    x = torch.randn(2, 8, 12, 12)
    step(run, run, (x,))
    (forward,), (backward,) = backend.forwards(), backend.backwards()
    assert count(forward, "scaled_mm") == 3 and count(backward, "scaled_mm") == 2 + 3
    left = forward.graph.output_node().args[0]
    assert not any(n.meta["val"].dtype == torch.uint8 and n.meta["val"].shape[0] == 288 for n in left
                   if hasattr(n, "meta")), "no codes of columns"


def test_codes_are_kept_where_they_are_smaller_than_the_image():
    model = nn.Sequential(nn.Tanh(), nn.Conv2d(32, 32, 2, 2, bias=False)).bfloat16()
    x = torch.randn(4, 32, 16, 16, dtype=torch.bfloat16, requires_grad=True)
    run, backend = compile_eager(model, Policy(None).on("conv", "quartet"))
    run(x)
    left = backend.forwards()[0].graph.output_node().args[0]
    assert (256, 64) in {tuple(n.meta["val"].shape) for n in left if n.meta["val"].dtype == torch.uint8}
    (fprop,) = (r for r in backend.records if r.role == "fprop")
    assert fprop.saved_bytes == (256 + 32) * 128 * 17 // 32


@pytest.mark.parametrize("recipe", ("quartet", "fp8", MXFP8), ids=lambda r: getattr(r, "name", r))
def test_gradients_point_where_they_should(recipe):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, 2, 1), nn.ReLU(),
                          nn.Conv2d(32, 16, 1))
    run, backend = compile_eager(model, Policy(None).on("conv", recipe))
    x = inputs_of(2, batch=8)
    ours, plain = step(run, model, (x,)), step(model, model, (x,))
    least = 0.7 if recipe == "quartet" else 0.97
    for name in plain[1]:
        assert cosine(ours[1][name], plain[1][name]) > least, name
    assert backend.lowered() == {"0": ALL, "2": ALL, "4": ALL} and not backend.alone()


def test_inductor_compiles_what_was_unfolded():
    """Strided, dilated and padded, forward and backward; the same numbers as run eagerly."""
    torch.manual_seed(0)
    model, x = nn.Conv2d(3, 8, 3, 2, 2, 2), torch.randn(2, 3, 9, 9, requires_grad=True)
    policy = Policy(None).on("conv", "fp8")
    eager, _ = compile_eager(model, policy)
    expected = step(eager, model, (x,))
    torch._dynamo.reset()
    run = torch.compile(model, backend="quartet", options={"policy": policy, "strict": True})
    assert_exact(step(run, model, (x,)), expected, rtol=1e-4, atol=1e-6)
