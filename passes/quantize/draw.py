"""Draw the random signs of all rotations at once: one launch in place of one or two a layer and direction."""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node

from quartet.lowering import ir
from quartet.lowering.ir.graph import Builder, aten, editing, is_backward
from quartet.lowering.ir.views import Signs
from quartet.passes.graph_pass import graph_pass
from quartet.passes.sites import Quantized
from quartet.passes.state import State


@graph_pass(reads=Quantized, optional=True, summary="random signs of all rotations of a direction are drawn at once")
def draw(state: State) -> None:
    """Signs of one seed and size become rows of a table over the range of their sites, most of which nothing reads:
    a layer has sixteen, and a row is a few words of Philox."""
    groups: dict[Any, list[tuple[Node, Signs]]] = {}
    with editing(state.gm) as graph:
        for node in graph.find_nodes(op="call_function", target=Signs.op):
            signs = Signs.of(node)
            region = is_backward(node), str(node.meta.get("recompute")), node.meta.get("ac_graph_id")
            groups.setdefault((signs.seed, signs.n, *region), []).append((node, signs))
        for members in groups.values():
            if len(members) > 1:
                _draw_together(graph, members)


def _draw_together(graph: Graph, members: list[tuple[Node, Signs]]) -> None:
    start = min(node for node, _ in members)
    first, last = min(signs.site for _, signs in members), max(signs.site for _, signs in members)
    build = Builder(graph, like=start, before=start, backward=is_backward(start))
    table = build(ir.SIGN_TABLE, members[0][1].seed, first, last - first + 1, members[0][1].n)
    for node, signs in members:
        node.replace_all_uses_with(build(aten.select.int, table, 0, signs.site - first))
