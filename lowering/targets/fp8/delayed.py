"""Largest magnitudes of operands under the rule ``delayed``: what casts an operand sees its own.

In the graph a quantiser takes 2^margin · (known > 0 ? known : amax(x)) and amax(x) is recorded, a read of x before the
one that casts it. An op that is given ``known`` needs that read in a first step only, and hands amax(x) on.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log2

import torch
from torch.fx import Graph, Node

from quartet.kernels.reference.formats.scales import APART
from quartet.lowering import ir
from quartet.lowering.ir.graph import FORWARD, Builder, argument, arguments, aten, is_backward, pull, source_of
from quartet.lowering.ir.ops.state import AMAX_BEGIN, AMAX_NOTE, AMAX_READ, AMAX_RECORD
from quartet.lowering.targets.fp8.weights import one_of


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


class Tables:
    """What the histories of a graph know, one number every ``APART``: kernels are compiled for where numbers lie."""

    def __init__(self) -> None:
        self._of: dict[Node, Node] = {}

    def known(self, build: Builder, history: History) -> Node:
        """fp32 ``[1, 1]``."""
        cut = source_of(history.known)
        begin = source_of(cut)
        if cut.target is not aten.slice.Tensor or begin.target not in (AMAX_BEGIN, AMAX_READ):
            pull(history.known, build.before)
            return history.known
        if begin not in self._of:
            first = Builder(build.graph, like=begin, before=begin.next, backward=False)
            first.meta = {"partitioner_tag": FORWARD}
            spread = first(aten.expand.default, first(aten.view.default, begin, [-1, 1, 1]), [-1, APART, 1])
            self._of[begin] = first(aten.clone.default, spread, memory_format=torch.contiguous_format)
        return one_of(build, self._of[begin], argument(cut, "start"))


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
