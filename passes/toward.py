"""Q-EMA (TetraJet, arXiv 2502.20853): a weight goes to whichever of its two neighbours on the grid is nearer to its
moving average, and then through fprop's quantiser, which keeps it.

    Y = Q(X)·Q(W')ᵀ        W' = toward(W, average of W)

A weight that crosses the middle between two codes again and again keeps one of them so. The average is state of the
parameter (``quartet.runtime.averages``): it advances in forward, outside of any checkpointed region, and is read where
W' is made, so that what is computed again in backward reads the same.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from quartet.lowering.graph import Builder, editing, is_backward, val
from quartet.lowering.weight_ops import TOWARD
from quartet.passes.delayed import MUST_BE_IN_FORWARD, weight_index
from quartet.passes.find_matmuls import input_indices
from quartet.passes.rewriting import normal, rewrite
from quartet.passes.sites import MatmulSite
from quartet.passes.state import State, recipe_of
from quartet.runtime.averages import AVERAGE_ADVANCE, AVERAGE_READ

CASTS = (torch.ops.prims.convert_element_type.default,)


def toward(state: State) -> None:
    """Move W of the planned sites that ask for it and whose fprop is quantised."""
    names: dict[Node, tuple[int, str]] = {}
    moved: dict[tuple[object, ...], Node] = {}
    with editing(state.gm) as graph:
        wanted = state.config.anchor
        anchor = next((n for n, i in input_indices(graph).items() if wanted is not None and i == wanted), None)
        for site in state.planned():
            recipe = recipe_of(site)
            if recipe.average is None or not site.active("fprop"):
                continue
            weight = None if anchor is None else weight_index(state, site)
            if anchor is None or weight is None or site.batch is not None or site.groups is not None:
                site.remark("fprop", "rounded to nearest: no moving average "
                            + ("in a nested region" if anchor is None else "of such a weight"))
                continue
            base = _uncast(site.w[0])
            if base not in names:
                names[base] = weight, _free_name(names, weight)
                _advance(state, site, anchor, base, *names[base], recipe.average)
            node, gemm = site.products["fprop"].node, recipe.fprop
            assert gemm is not None
            key = (*site.w, str(gemm.b.spec), str(node.meta.get("recompute")), node.meta.get("ac_graph_id"))
            if key not in moved:
                moved[key] = _moved(state, site, anchor, base, *names[base], recipe.average)
            site.w = moved[key], False
            rewrite(state, site, "fprop", lambda build, product: product)
            site.remark("fprop", f"W rounds toward its moving average ({recipe.average:g})")


def _advance(state: State, site: MatmulSite, anchor: Node, base: Node, weight: int, name: str, decay: float) -> None:
    """Advance an average, in graphs that train."""
    if not any(is_backward(node) for node in state.gm.graph.nodes):
        return
    node = site.products["fprop"].node
    build = Builder(state.gm.graph, like=node, before=node, backward=False)
    build.meta = {"partitioner_tag": MUST_BE_IN_FORWARD}
    build(AVERAGE_ADVANCE, anchor, base, weight, name, decay)


def _moved(state: State, site: MatmulSite, anchor: Node, base: Node, weight: int, name: str, decay: float) -> Node:
    """W', in normal orientation."""
    fprop = recipe_of(site).fprop
    assert fprop is not None
    node = site.products["fprop"].node
    build = Builder(state.gm.graph, like=node, before=node, backward=False)
    average = build(AVERAGE_READ, anchor, base, weight, name, decay)
    w = normal(state, build, site.w)
    return build(TOWARD, w, normal(state, build, (average, site.w[1])), str(fprop.b.spec))


def _uncast(node: Node) -> Node:
    """What ``node`` is in another dtype: the average is of the parameter itself, not of a rounded copy."""
    while node.target in CASTS and isinstance(node.args[0], Node) and val(node.args[0]).is_floating_point():
        node = node.args[0]
    return node


def _free_name(names: dict[Node, tuple[int, str]], weight: int) -> str:
    """``w``; for more that is made of the same parameter ``w2``, ``w3``, …"""
    number = 1 + sum(of == weight for of, _ in names.values())
    return "w" if number == 1 else f"w{number}"
