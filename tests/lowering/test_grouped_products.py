"""Products of groups and batches on a Hopper that is not here: what the tensor cores are given, and the numbers."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from experts_on_hopper import COUNTS, ENDS, TOKENS, on, scaled_grouped_mm
from torch import nn
from traced import assert_no_semantics, carry_out, targets, trace

from quartet.kernels.spec import QuantSpec
from quartet.lowering import ir, registry
from quartet.lowering.ir.ops import experts as expert_ops
from quartet.lowering.ir.ops import fp8 as fp8_ops
from quartet.lowering.ir.ops import fused as cuda_ops
from quartet.lowering.ir.ops import grouped as grouped_ops
from quartet.runtime.devices import Target

aten = torch.ops.aten
BF16 = torch.bfloat16


class Experts(nn.Module):
    def __init__(self, out=48, width=64):
        super().__init__()
        self.weight = nn.Parameter((torch.randn(len(COUNTS), out, width) / 8).to(BF16))

    def forward(self, x, ends):
        return F.grouped_mm(x, self.weight.transpose(1, 2), offs=ends)


class Batches(nn.Module):
    def forward(self, a, b):
        return torch.bmm(a, b)


def tokens(width=64):
    return torch.randn(TOKENS, width, dtype=BF16, requires_grad=True)


def products(gm):
    """(A, B, scale of A, scale of B) of every grouped product as fake tensors, and the other arguments."""
    found = gm.graph.find_nodes(op="call_function", target=aten._scaled_grouped_mm.default)
    return [([arg.meta["val"] for arg in node.args[:4]], node.args[4:]) for node in found]


@pytest.mark.parametrize("recipe, kernel", [("fp8", "fp8-grouped"), ("fp8-rowwise", "fp8-grouped"),
                                            ("quartet", "triton-fp8"), ("tetrajet", "triton-fp8")])
@pytest.mark.parametrize("out, width", [(48, 64), (40, 64), (48, 72)])
def test_experts_take_the_tensor_cores(recipe, kernel, out, width):
    """PyTorch's own checks of shapes and strides run as the nodes are made."""
    records = []
    forward, backward = trace("sm_90", Experts(out, width), tokens(width), ENDS, policy=on("grouped", recipe),
                              records=records, reuse_weights=False)
    assert {(r.role, r.kernel) for r in records} == {(role, kernel) for role in ("fprop", "dgrad", "wgrad")}
    if width % 32 == 0 or kernel != "triton-fp8" or recipe == "quartet":
        assert_no_semantics(forward, backward)  # else W is cut from whole blocks before it is turned
    assert not targets(forward)[grouped_ops.QUANTIZE_GROUPS] and not targets(backward)[grouped_ops.QUANTIZE_GROUPS]
    (fprop,), (dgrad, wgrad) = products(forward), sorted(products(backward), key=lambda p: p[0][1].dim(), reverse=True)
    groups = len(COUNTS)
    for ((a, b, left, right), rest), n, k in ((fprop, out, width), (dgrad, width, out)):
        block = 32 if kernel == "triton-fp8" else 16
        n = -(-n // block) * block if recipe == "quartet" and b is dgrad[0][1] else -(-n // 16) * 16  # rotated back
        rows, k = a.shape[0], -(-k // block) * block
        assert a.shape == (rows, k) and b.shape == (groups, k, n) and b.stride() == (n * k, 1, k)
        assert left.shape == (rows,) and right.shape == (groups, n) and right.is_contiguous()
        assert rest[1:] == (None, None, BF16, True)
    (a, b, left, right), _ = wgrad
    assert a.shape[1] == b.shape[0] >= TOKENS and a.shape[1] % 16 == 0 and b.stride(0) == 1
    assert left.shape == (groups * a.shape[0],) and right.shape == (groups * b.shape[1],)


@pytest.mark.parametrize("recipe", ["fp8", "fp8-rowwise", "quartet"])
def test_sizes_may_be_symbolic(recipe):
    a, b = (torch.randn(3, *size, dtype=BF16, requires_grad=True) for size in ((40, 64), (64, 48)))
    for model, inputs, op, product in ((Experts(), (tokens(), ENDS), "grouped", aten._scaled_grouped_mm.default),
                                       (Batches(), (a, b), "bmm", fp8_ops.BMM)):
        forward, *_, backward = trace("sm_90", model, *inputs, policy=on(op, recipe), dynamic=True, reuse_weights=False)
        assert [targets(gm)[product] for gm in (forward, backward)] == [1, 2]


def test_a_tensor_of_weights_with_one_scale_is_quantised_once():
    """Where nothing is reused, dgrad reads the codes of fprop, every expert's matrix turned."""
    forward, backward = trace("sm_90", Experts(), tokens(), ENDS, policy=on("grouped", "fp8"), reuse_weights=False)
    assert targets(forward)[fp8_ops.CAST_ROWS] == targets(forward)[fp8_ops.CAST] == 1  # X where its rows lie, and W
    assert targets(backward)[fp8_ops.CAST_ROWS] == 1  # E and its transpose
    (copy,) = backward.graph.find_nodes(op="call_function", target=fp8_ops.ROW_MAJOR)
    assert copy.args[0].meta["val"].shape == (len(COUNTS), 64, 48) and not targets(backward)[ir.DEQUANTIZE]


def test_rows_of_groups_are_cast_by_one_op():
    _, backward = trace("sm_90", Experts(), tokens(), ENDS, policy=on("grouped", "fp8-rowwise"))
    assert targets(backward)[fp8_ops.CAST_GROUPS] == 2


def test_a_gradient_of_mxfp4_experts_is_read_once():
    _, backward = trace("sm_90", Experts(), tokens(), ENDS, policy=on("grouped", "quartet"))
    assert targets(backward)[cuda_ops.QUANTIZE_BOTH] == 1
    stacks = [node.args[-2] for node in backward.graph.find_nodes(op="call_function", target=cuda_ops.REQUANTIZE)]
    assert sorted(stacks) == [1, len(COUNTS)]  # the tokens, and every expert's weights by themselves
    (_, wgrad) = sorted(products(backward), key=lambda p: p[0][1].dim(), reverse=True)
    assert wgrad[0][2].shape == (len(COUNTS) * wgrad[0][0].shape[0],)
    folds = [node for gm in (backward,) for node in gm.graph.nodes if node.target in (
        cuda_ops.QUANTIZE_BOTH, cuda_ops.REQUANTIZE) and node.args[-1] is not None]
    assert len(folds) == 2  # of both operands of wgrad, a scale in each group


@pytest.mark.parametrize("op, recipe, kernels", [
    ("grouped", "nvfp4", {"triton"}), ("grouped", "mxfp8", {"grouped-mm"}), ("grouped", "int8-all", {"grouped-mm"}),
    ("grouped", "fp8-delayed", {"fp8-grouped", "grouped-mm"}),  # its gradients are E5M2
    ("bmm", "quartet", {"triton-fp8"}), ("bmm", "fp8", {"fp8-grouped"}), ("bmm", "nvfp4", {"triton"}),
    ("bmm", "mxfp8", {"inductor"})])
def test_what_takes_the_others(op, recipe, kernels):
    records = []
    if op == "grouped":
        trace("sm_90", Experts(), tokens(), ENDS, policy=on(op, recipe), records=records)
    else:
        a, b = torch.randn(3, 40, 64, dtype=BF16, requires_grad=True), torch.randn(3, 64, 48, dtype=BF16)
        trace("sm_90", Batches(), a, b.requires_grad_(), policy=on(op, recipe), records=records)
    assert {r.kernel for r in records} == kernels


@pytest.mark.parametrize("target, kernel", [("sm_80", "triton"), ("sm_89", "triton"), ("sm_100a", "triton"),
                                            ("sm_120a", "triton"), ("sm_90", "triton-fp8"), ("cpu", "cpp")])
def test_where_groups_have_no_fp8_their_quantisers_are_fused_still(target, kernel):
    spec = QuantSpec.parse("e2m1/32 e8m0 headroom stochastic")
    found, reasons = registry.choose(Target.named(target), BF16, ((spec, 32), (spec, 32)),
                                     product=grouped_ops.SCALED_GROUPED_MM)
    assert found.name == kernel
    why = {"sm_89": ("triton-fp8", "for compute capability 9.0 only, not 8.9"),
           "sm_100a": ("cutlass", "multiplies matrices, not groups")}.get(target)
    assert why is None or why[1] in reasons[why[0]]


def test_accumulation_can_be_promoted():
    options = {"policy": on("grouped", "fp8"), "accumulation": "promoted"}
    forward, backward = trace("sm_90", Experts(), tokens(), ENDS, reuse_weights=False, **options)
    assert [rest[-1] for gm in (forward, backward) for _, rest in products(gm)] == [False] * 3
    for gm in trace("sm_90", Experts(), tokens(), ENDS, **options):
        assert [node.args[-1] for node in gm.graph.find_nodes(op="call_function", target=expert_ops.MM)] == [False]


# the numbers
@pytest.fixture
def written_down():
    library = torch.library.Library("aten", "IMPL")
    library.impl("_scaled_grouped_mm", scaled_grouped_mm, "CPU")
    yield
    library._destroy()


def assert_near(got, wanted):
    for g, w in zip(got, wanted, strict=True):
        assert g.shape == w.shape and torch.equal(g.isnan(), w.isnan())
        assert float((g.float() - w.float()).norm() / w.float().norm()) < 4e-3  # a bf16 output's rounding, both ways


@pytest.mark.parametrize("recipe", ["fp8", "fp8-rowwise", "halo-fp8-2"])
@pytest.mark.parametrize("out, width", [(48, 64), (40, 72)])
def test_experts_are_the_references(written_down, recipe, out, width):
    torch.manual_seed(2)
    model, x = Experts(out, width), tokens(width)
    gradient = torch.randn(TOKENS, out).to(BF16)
    run = partial(carry_out, "sm_90", model, x, on("grouped", recipe), gradient, rest=(ENDS,))
    got, graphs = run()
    assert sum(targets(gm)[product] for gm in graphs for product in (
        aten._scaled_grouped_mm.default, expert_ops.MM)) == 3
    wanted, plain = run(disable_kernels=["fp8-grouped"])
    assert not any(targets(gm)[aten._scaled_grouped_mm.default] for gm in plain)
    assert_near(got, wanted)


@pytest.mark.parametrize("recipe", ["fp8", "fp8-rowwise"])
@pytest.mark.parametrize("rows, cols, width", [(40, 48, 64), (33, 20, 70)])
def test_batches_are_the_references(written_down, recipe, rows, cols, width):
    torch.manual_seed(2)

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, width, cols).to(BF16))

        def forward(self, a):
            return torch.bmm(a, self.weight)

    a, gradient = torch.randn(3, rows, width).to(BF16), torch.randn(3, rows, cols).to(BF16)
    run = partial(carry_out, "sm_90", Stack(), a, on("grouped", recipe), gradient)
    got, graphs = run()
    assert sum(targets(gm)[fp8_ops.BMM] for gm in graphs) == 3
    assert_near(got, run(disable_kernels=["fp8-grouped"])[0])


def test_batches_of_more_matrices_than_the_library_takes(written_down):
    a, b = (torch.randn(2 * fp8_ops.MOST_GROUPS + 5, n, 16).to(torch.float8_e4m3fn) for n in (3, 16))
    scales = torch.rand(len(a), 3), torch.rand(len(b), 16)
    got = torch.ops.quartet.fp8_bmm(a, b, *scales, BF16, True)
    assert torch.equal(got, scaled_grouped_mm(a, b.mT, *scales, out_dtype=BF16))
