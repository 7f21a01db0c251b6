"""What the lowering for GPUs makes of a graph, compiled for an H100 that is not here."""

from functools import partial

import pytest
import torch
from traced import assert_no_semantics, linear, targets, trace

from quartet.lowering import ir
from quartet.lowering.ir.ops import fused as cuda_ops

pytest.importorskip("triton")

aten = torch.ops.aten


@pytest.fixture
def graphs():
    return partial(trace, "sm_90")


@pytest.mark.parametrize("dynamic", [False, True])
def test_one_linear(graphs, dynamic):
    records = []
    forward, *_, backward = graphs(*linear(), records=records, dynamic=dynamic, recompute="none")
    assert {record.kernel for record in records} == {"triton-fp8"}
    assert_no_semantics(forward, backward)
    there, back = targets(forward), targets(backward)
    assert there[cuda_ops.QUANTIZE] == 2 and there[aten._scaled_mm.default] == 1 and not there[cuda_ops.FOLD]
    assert back[cuda_ops.QUANTIZE_BOTH] == 1  # the gradient is read once
    assert back[cuda_ops.REQUANTIZE] == 2 and back[aten._scaled_mm.default] == 2 and back[cuda_ops.UNROTATE] == 2
    assert not back[aten.constant_pad_nd.default] and not there[aten.constant_pad_nd.default]


@pytest.mark.parametrize(("recipe", "sizes"), [("quartet", [1] * 4 + [4, 8]), ("quartet-paper", [1] * 6 + [8])])
def test_what_is_kept_is_packed(graphs, recipe, sizes):
    """Codes and scales of X and W; their masks in the paper, and the fixed signs otherwise; the seed."""
    forward, _ = graphs(*linear(), policy=recipe)
    made = [node for node in forward.graph.output_node().args[0][1:] if node.op == "call_function"]
    assert sorted(node.meta["val"].dtype.itemsize for node in made) == sizes


@pytest.mark.parametrize(("recipe", "masked", "fixed"), [("quartet", False, 1), ("quartet-paper", True, 0)])
def test_signs_and_masks_are_arguments_of_the_fused_kernels(graphs, recipe, masked, fixed):
    """One vector of fixed signs a graph, kept once; what it is before is one launch with it or without."""
    layers = [torch.nn.Linear(64, 64, bias=False) for _ in range(3)]
    x = torch.randn(40, 64, dtype=torch.bfloat16, requires_grad=True)
    forward, backward = graphs(torch.nn.Sequential(*layers).bfloat16(), x, policy=recipe)
    assert_no_semantics(forward, backward)
    there, back = targets(forward), targets(backward)
    assert there[ir.FIXED_SIGNS] == fixed and not back[ir.FIXED_SIGNS]
    assert there[cuda_ops.QUANTIZE] == 6 and back[cuda_ops.UNROTATE] == back[cuda_ops.REQUANTIZE] == 6
    for node in forward.graph.find_nodes(op="call_function", target=cuda_ops.QUANTIZE):
        assert (node.args[1], node.args[2] is not None) == (32, bool(fixed))
    for node in backward.graph.find_nodes(op="call_function", target=cuda_ops.UNROTATE):
        _, mask, rotation, signs = node.args[:4]
        assert (mask is not None, rotation, signs is not None) == (masked, 32, bool(fixed))


def test_products_that_are_computed_again_fold_stored_codes(graphs):
    first, second = torch.nn.Linear(64, 96, bias=False), torch.nn.Linear(96, 64, bias=False)
    model = torch.nn.Sequential(first, torch.nn.SiLU(), second)
    x = torch.randn(40, 64, dtype=torch.bfloat16, requires_grad=True)
    for recompute, products in (("gemm", 5), ("none", 4)):
        forward, backward = graphs(model.bfloat16(), x, recompute=recompute)
        assert_no_semantics(forward, backward)
        assert targets(backward)[aten._scaled_mm.default] == products
        assert bool(targets(backward)[cuda_ops.FOLD]) == (recompute == "gemm")


def test_without_fp8_products_are_made_of_dequantised_operands(graphs):
    records = []
    forward, backward = graphs(*linear(torch.float32), records=records)
    assert {record.kernel for record in records} == {"triton"}
    assert_no_semantics(forward, backward)
    assert targets(forward)[cuda_ops.DEQUANTIZE] == 2 and targets(forward)[aten.mm.default] == 1
    assert targets(backward)[aten.mm.default] == 2 and not targets(backward)[aten._scaled_mm.default]


def test_shapes_of_the_products(graphs):
    forward, backward = graphs(*linear(k=80, n=33, tokens=7))
    (gemm,) = forward.graph.find_nodes(op="call_function", target=aten._scaled_mm.default)
    a, b, a_scales, b_scales = (arg.meta["val"] for arg in gemm.args[:4])
    assert a.shape == (7, 96) and b.shape == (96, 48)  # K to whole blocks, N to 16
    assert a_scales.shape == (7, 1) and b_scales.shape == (1, 48)
    for gemm in backward.graph.find_nodes(op="call_function", target=aten._scaled_mm.default):
        a, b = (arg.meta["val"] for arg in gemm.args[:2])
        assert a.shape[1] == b.shape[0] and a.shape[1] % 32 == 0 and b.stride(0) == 1 and a.stride(1) == 1


def test_a_shared_gradient_of_two_layers_is_quantised_for_each(graphs):
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = (torch.nn.Linear(64, 64, bias=False) for _ in range(2))

        def forward(self, x):
            return self.q(x) + self.k(x)

    x = torch.randn(40, 64, dtype=torch.bfloat16, requires_grad=True)
    forward, backward = graphs(Two().bfloat16(), x)
    assert targets(forward)[cuda_ops.QUANTIZE] == 3  # X once
    assert targets(backward)[cuda_ops.QUANTIZE_BOTH] == 2  # each layer draws its own bits
    assert targets(backward)[cuda_ops.REQUANTIZE] == 3


@pytest.mark.parametrize("policy", ["quartet", "fp8", "fp8-rowwise"])
@pytest.mark.parametrize(("accumulation", "fast"), [("fast", True), ("promoted", False)])
def test_accumulation(graphs, policy, accumulation, fast):
    made = [node for gm in graphs(*linear(k=64, n=64, tokens=64), policy=policy, accumulation=accumulation)
            for node in gm.graph.find_nodes(op="call_function", target=aten._scaled_mm.default)]
    assert [node.args[7] for node in made] == [fast] * 3
