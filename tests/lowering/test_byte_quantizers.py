"""Quantisers of one-byte codes by kernels of their own, where these run; where they do not, graphs are as without."""

import pytest
import torch
from traced import carry_out, linear, targets, trace

from quartet.lowering import ir
from quartet.lowering.ir.ops import fused
from quartet.runtime.devices import Target

pytest.importorskip("triton")

OPS = fused.cuda_quantize_bytes, fused.cuda_quantize_bytes_both
DISABLED = tuple(f"{op.name}.triton" for op in OPS)
# recipe, target: quantise nodes of forward and backward by kernels, of them pairs along both axes
CASES = {
    ("mxfp8", "sm_100a"): ([2, 2], [0, 1]),  # X and W; X and W again, turned, and E along both axes
    ("fp8-block", "sm_90a"): ([2, 2], [0, 1]),
    ("int8-all", "sm_80"): ([1, 1], [0, 0]),  # X, and E; W has one scale, rows of a transpose are Inductor's
}


def counted(graphs):
    return [[targets(gm)[op.overload] for gm in graphs] for op in OPS]


def test_they_are_chosen_where_triton_runs():
    for op in OPS:
        assert {op.choose(Target.named(name))[0].name for name in ("sm_80", "sm_90a", "sm_100a")} == {"triton"}
        assert {op.choose(Target.named(name))[0].name for name in ("gfx950", "cpu")} == {"reference"}


@pytest.mark.parametrize("recipe, target", CASES)
def test_what_is_quantised_where_they_run(recipe, target):
    graphs = trace(target, *linear(k=256, n=128, tokens=128), policy=recipe)
    assert counted(graphs) == list(CASES[recipe, target])


@pytest.mark.parametrize("recipe, target", list(CASES)[:2])
def test_the_numbers_stay(recipe, target):
    model, x = linear(k=96, n=70, tokens=33)
    gradient = torch.randn(33, 70, dtype=torch.bfloat16)
    by_kernels, graphs = carry_out(target, model, x, recipe, gradient)
    assert sum(map(sum, counted(graphs))) > 0 and not any(targets(gm)[ir.QUANTIZE] for gm in graphs)
    by_inductor, graphs = carry_out(target, model, x, recipe, gradient, disable_kernels=DISABLED)
    assert counted(graphs) == [[0, 0], [0, 0]]
    assert all(torch.equal(a, b) for a, b in zip(by_kernels, by_inductor, strict=True))


def test_a_disabled_kernel_leaves_the_op_to_inductor():
    graphs = trace("sm_90a", *linear(k=256, n=128, tokens=128), policy="fp8-block", disable_kernels=DISABLED)
    assert counted(graphs) == [[0, 0], [0, 0]]
