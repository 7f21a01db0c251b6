"""Largest magnitudes of operands under the rule ``delayed``: what casts an operand sees its own.

In the graph a quantiser takes 2^margin · (known > 0 ? known : amax(x)) and amax(x) is recorded, a read of x before the
one that casts it. An op that is given ``known`` needs that read in a first step only, and hands amax(x) on.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log2

from torch.fx import Graph, Node

from quartet.lowering import ir
from quartet.lowering.ir.graph import argument, arguments, aten, is_backward
from quartet.lowering.ir.ops.state import AMAX_NOTE, AMAX_RECORD


@dataclass(frozen=True)
class History:
    """What an operand is scaled by: ``known``, or 0, of earlier steps; ``current``, the node of its own."""

    known: Node
    current: Node
    margin: int

    @staticmethod
    def of(amax: Node | None, quantizer: Node) -> History | None:
        """What is behind a quantiser's ``amax``; None without a history, or where x is measured in another phase."""
        margin = 0
        if amax is not None and amax.target is aten.mul.Tensor and isinstance(factor := argument(amax, "other"), float):
            amax, margin = argument(amax, "self"), round(log2(factor))
        if amax is None or amax.target is not aten.where.self:
            return None
        given = arguments(amax)
        known, current = given["self"], given["other"]
        if current.target is not ir.AMAX or is_backward(current) != is_backward(quantizer):
            return None
        return History(known, current, margin)


def record_instead(graph: Graph, seen: dict[Node, Node]) -> None:
    """``seen``: a node of amax(x) → what is recorded in its place, by nodes that are moved behind it."""
    for target in (AMAX_NOTE, AMAX_RECORD):
        for recorder in graph.find_nodes(op="call_function", target=target):
            for current in argument(recorder, "amax"):
                if current in seen:
                    recorder.replace_input_with(current, seen[current])
            last = max(recorder.all_input_nodes)
            if last > recorder:
                last.append(recorder)
