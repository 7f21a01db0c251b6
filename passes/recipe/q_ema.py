"""Q-EMA (TetraJet, arXiv 2502.20853): a weight goes to whichever of its two neighbours on the grid is nearer to its
moving average, and then through fprop's quantiser, which keeps it.

    Y = Q(X)·Q(W')ᵀ        W' = toward(W, average of W)

A weight that crosses the middle between two codes again and again keeps one of them so. The average is state of the
parameter (``quartet.runtime.slots.averages``): it advances in forward, outside of any checkpointed region, and is read
where W' is made, so that what is computed again in backward reads the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from quartet.lowering.ir.graph import Builder, editing, is_backward, source_of, val
from quartet.lowering.ir.ops.state import AVERAGE_ADVANCE, AVERAGE_READ
from quartet.lowering.ir.ops.weights import TOWARD
from quartet.passes.find.find_matmuls import canonical, input_indices, parameter_origins
from quartet.passes.graph_pass import graph_pass
from quartet.passes.quantize.delayed import MUST_BE_IN_FORWARD, weight_index
from quartet.passes.rewriting import normal, rewrite
from quartet.passes.sites import MADE_KEY, Planned
from quartet.passes.state import State
from quartet.runtime.view_ops import CAST


@dataclass(frozen=True)
class _Average:
    """The average of ``base``, by the anchor of the graph, the input that is the parameter, and its name there."""

    anchor: Node
    base: Node
    weight: int
    name: str
    decay: float

    def node(self, build: Builder, op: Any) -> Node:
        return build(op, self.anchor, self.base, self.weight, self.name, self.decay)


@graph_pass(reads=Planned, writes=Planned, optional=True,
            summary="weights to whichever neighbour on the grid is nearer to their moving average")
def toward(state: State) -> None:
    """Move W of the planned sites that ask for it and whose fprop is quantised."""
    averages: dict[Node, _Average] = {}
    parts = _parts(state)
    moved: dict[tuple[Any, ...], Node] = {}
    parameters = parameter_origins(state)
    with editing(state.gm) as graph:
        wanted = state.config.anchor
        anchor = next((n for n, i in input_indices(graph).items() if wanted is not None and i == wanted), None)
        for site in state.at(Planned):
            decay, fprop = site.recipe.average, site.active("fprop")
            if decay is None or fprop is None:
                continue
            weight = None if anchor is None else weight_index(state, site)
            one = site.batch is None and site.groups is None and site.w[0] in parameters
            if anchor is None or weight is None or not one:
                state.advance(site.remark("fprop", "rounded to nearest: no moving average "
                                          + ("in a nested region" if anchor is None else "of such a weight")))
                continue
            base, flipped = _weight_itself(site.w)
            if base not in averages:
                averages[base] = _Average(anchor, base, weight, _name(parts, base), decay)
                _advance(state, site, averages[base])
            node, spec = site.forward.node, str(fprop.b.spec)
            region = str(node.meta.get("recompute")), node.meta.get("ac_graph_id")
            key = base, flipped, val(site.w[0]).dtype, spec, region
            if key not in moved:
                moved[key] = _moved(state, site, averages[base], flipped, spec)
            site = rewrite(state, replace(site, w=(moved[key], False)), "fprop", lambda build, product: product)
            state.advance(site.remark("fprop", f"W rounds toward its moving average ({decay:g})"))


def _advance(state: State, site: Planned, average: _Average) -> None:
    """Advance an average, in graphs that train."""
    if not any(is_backward(node) for node in state.gm.graph.nodes):
        return
    node = site.forward.node
    build = Builder(state.gm.graph, like=node, before=node, backward=False)
    build.meta = {"partitioner_tag": MUST_BE_IN_FORWARD}
    average.node(build, AVERAGE_ADVANCE)


def _moved(state: State, site: Planned, average: _Average, flipped: bool, spec: str) -> Node:
    """W', in normal orientation."""
    node = site.forward.node
    build = Builder(state.gm.graph, like=node, before=node, backward=False)
    given = average.node(build, AVERAGE_READ)
    moved = build(TOWARD, normal(state, build, site.w), normal(state, build, (given, flipped)), spec)
    moved.meta[MADE_KEY] = "toward"
    return moved


def _weight_itself(operand: tuple[Node, bool]) -> tuple[Node, bool]:
    """What an operand shows transposed or in another dtype: the average is of the parameter, not of a rounded copy."""
    node, flipped = operand
    while True:
        source, turned = canonical(node)
        if source.target is CAST and val(source_of(source)).is_floating_point():
            source = source_of(source)
        if source is node or val(source).dim() != 2:
            return node, flipped
        node, flipped = source, flipped != turned


def _parts(state: State) -> list[list[Node]]:
    """What products multiply, of each parameter in the order of the graph, whatever the policy does to them."""
    found: dict[int | None, list[Node]] = {}
    for site in state.sites:
        base, _ = _weight_itself(site.w)
        of = found.setdefault(weight_index(state, site), [])
        if base not in of:
            of.append(base)
    return list(found.values())


def _name(parts: list[list[Node]], base: Node) -> str:
    """``w``; for more that is made of the same parameter ``w2``, ``w3``, …"""
    number = next(1 + of.index(base) for of in parts if base in of)
    return "w" if number == 1 else f"w{number}"
