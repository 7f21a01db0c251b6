"""Outlier clamping and compensation (arXiv 2501.17116): take the largest elements of X out of what is quantised.

X' is X clipped to two quantiles of all its elements, ΔX = X − X' is sparse:

    Y = X'·Wᵀ + ΔX·Wᵀ        gW = Eᵀ·X' + Eᵀ·ΔX        gX = E·W

The products of ΔX are in high precision, with the weight itself. The clip is not differentiated: all of X gets the
gradient, clipped or not, so dgrad is as it was. Until something is quantised the function is the same but for rounding.
Backward needs ΔX only as its elements, where wgrad is quantised.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from quartet.lowering.ir.graph import Builder, aten, editing, shape
from quartet.lowering.ir.ops.outliers import SPARSE_MM, SPLIT_OUTLIERS
from quartet.passes.graph_pass import graph_pass
from quartet.passes.rewriting import normal, rewrite
from quartet.passes.sites import MADE_KEY, Planned
from quartet.passes.state import State


@dataclass(frozen=True)
class _Split:
    """X' ``[tokens, in]``, and ΔX by its values, columns and starts."""

    clipped: Node
    rest: tuple[Node, Node, Node]


@graph_pass(reads=Planned, writes=Planned, optional=True,
            summary="the largest elements of X apart, for recipes that keep them exact")
def outliers(state: State) -> None:
    """Split X of the planned sites that ask for it and whose fprop is quantised."""
    shared: dict[Any, _Split] = {}
    with editing(state.gm):
        for site in state.at(Planned):
            quantile = site.recipe.outliers
            roles = [role for role in ("fprop", "wgrad") if site.active(role)]
            if quantile is None or "fprop" not in roles:
                continue
            if site.batch is not None or site.groups is not None:
                state.advance(site.remark("fprop", "outliers stay: X is not one matrix"))
                continue
            node = site.forward.node
            key = site.x_group, quantile, str(node.meta.get("recompute")), node.meta.get("ac_graph_id")
            if key not in shared:
                shared[key] = _split(state, site, quantile)
            state.advance(_separate(state, site, roles, shared[key]))


def _split(state: State, site: Planned, quantile: float) -> _Split:
    node = site.forward.node
    build = Builder(state.gm.graph, like=node, before=node, backward=False)
    both = build(SPLIT_OUTLIERS, normal(state, build, site.x), quantile)
    clipped, values, columns, starts = (build.item(both, index) for index in range(4))
    clipped.meta[MADE_KEY] = f"without-outliers-{round(1e4 * quantile)}"
    return _Split(clipped, (values, columns, starts))


def _separate(state: State, site: Planned, roles: list[str], split: _Split) -> Planned:
    def add_forward(build: Builder, y: Node) -> Node:
        weight = normal(state, build, site.w, flip=True)
        size = build.size(shape(split.clipped)[1])
        return build(aten.add.Tensor, y, build(SPARSE_MM, *split.rest, build.cast(weight, site.dtype), size, False))

    def add_wgrad(build: Builder, gw: Node) -> Node:
        e = build.cast(normal(state, build, site.gradients["wgrad"].e), site.dtype)
        rest = build(SPARSE_MM, *split.rest, e, build.size(shape(split.clipped)[1]), True)
        return build(aten.add.Tensor, gw, build.transpose(rest))

    separated = replace(site, x=(split.clipped, False))
    for role in roles:
        separated = rewrite(state, separated, role, {"fprop": add_forward, "wgrad": add_wgrad}[role])
        separated = separated.remark(role, "outliers of X in a sparse product")
    return separated
