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
from quartet.lowering.ir.weights import DGE
from quartet.passes.rewriting import added, normal, rewrite
from quartet.passes.sites import MatmulSite
from quartet.passes.state import State, recipe_of
from quartet.passes.views import operands


def estimator(state: State) -> None:
    """Multiply wgrad of the planned sites that ask for it and whose fprop is quantised."""
    with editing(state.gm):
        for site in state.planned():
            if recipe_of(site).estimator != "dge" or not (site.active("fprop") and "wgrad" in site.products):
                continue
            if site.batch is not None or site.groups is not None:
                site.remark("wgrad", "straight through: W is not one matrix")
                continue
            _estimate(state, site)


def _estimate(state: State, site: MatmulSite) -> None:
    fprop = recipe_of(site).fprop
    assert fprop is not None

    def times_slope(build: Builder, gw: Node) -> Node:
        slope = build(DGE, normal(state, build, site.w), str(fprop.b.spec))
        return build(aten.mul.Tensor, build.cast(gw, torch.float32), slope)

    if site.active("wgrad"):
        rewrite(state, site, "wgrad", times_slope)
    else:
        _times_in_place(state, site, times_slope)
    site.remark("wgrad", "times the slope of W's quantiser (DGE)")


def _times_in_place(state: State, site: MatmulSite, times_slope: Callable[[Builder, Node], Node]) -> None:
    """The same for a product that stays as autograd wrote it."""
    product = site.products["wgrad"]
    old = product.node
    build = Builder(state.gm.graph, like=old, before=old, backward=is_backward(old))
    product.node = build(aten.mm.default, *operands(old))
    normal_way = build.transpose(product.node) if product.flipped else product.node
    out = build.cast(times_slope(build, normal_way), val(old).dtype)
    state.replace(old, added(build, build.transpose(out) if product.flipped else out, old))
