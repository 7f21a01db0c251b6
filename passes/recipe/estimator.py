"""The gradient of a quantised weight by the slope of a softened quantiser (DGE, arXiv 2501.17116):

    gW = (Eᵀ·X) ⊙ f'(W)

``quartet.kernels.reference.estimator`` has f'. It reads the weight itself, of which autograd keeps nothing more, and
where fprop is not quantised there is no slope to speak of: then gW stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Node

from quartet.lowering.ir.graph import Builder, aten, editing, is_backward, val
from quartet.lowering.ir.ops.weights import DGE
from quartet.lowering.recipe.types import Gemm
from quartet.passes.graph_pass import graph_pass
from quartet.passes.matrices import operands
from quartet.passes.rewriting import added, normal, rewrite
from quartet.passes.sites import Planned
from quartet.passes.state import State


@graph_pass(reads=Planned, writes=Planned, optional=True, summary="W's gradient by the slope of a softened quantiser")
def estimator(state: State) -> None:
    """Multiply wgrad of the planned sites that ask for it and whose fprop is quantised."""
    with editing(state.gm):
        for site in state.at(Planned):
            fprop = site.active("fprop")
            if site.recipe.estimator != "dge" or fprop is None or "wgrad" not in site.gradients:
                continue
            if site.batch is not None or site.groups is not None:
                state.advance(site.remark("wgrad", "straight through: W is not one matrix"))
                continue
            state.advance(_estimate(state, site, fprop))


def _estimate(state: State, site: Planned, fprop: Gemm) -> Planned:
    def times_slope(build: Builder, gw: Node) -> Node:
        slope = build(DGE, normal(state, build, site.w), str(fprop.b.spec))
        return build(aten.mul.Tensor, build.cast(gw, torch.float32), slope)

    estimated = (rewrite(state, site, "wgrad", times_slope) if site.active("wgrad") else
                 _times_in_place(state, site, times_slope))
    return estimated.remark("wgrad", "times the slope of W's quantiser (DGE)")


def _times_in_place(state: State, site: Planned, times_slope: Callable[[Builder, Node], Node]) -> Planned:
    """The same for a product that stays as autograd wrote it."""
    old, flipped = site.gradients["wgrad"].node, site.gradients["wgrad"].flipped
    build = Builder(state.gm.graph, like=old, before=old, backward=is_backward(old))
    mm = build(aten.mm.default, *operands(old))
    out = build.cast(times_slope(build, build.transpose(mm) if flipped else mm), val(old).dtype)
    state.replace(old, added(build, build.transpose(out) if flipped else out, old))
    return site.with_product("wgrad", mm, flipped)
