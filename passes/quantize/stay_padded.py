"""Compute what stands between two products of groups of rows that stay padded.

    pad(f(unpad(a), unpad(b), c)) = f(a, b, pad(c)) in rows that belong to a token, 0 in the others

f treats every row alike, as silu(gate) · up and its gradients do; c is one number a token. Rows that belong to no token
hold what the products have left in them, which f may make anything of: so they are cleared where a quantiser reads.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from quartet.lowering.ir.graph import Builder, argument, editing, index_of, is_backward, maker, source_of
from quartet.lowering.ir.ops.grouped import CLEAR_ROWS, GATHER_ROWS, PAD_GROUPS, PLACE, SOURCE
from quartet.passes.graph_pass import graph_pass
from quartet.passes.sites import Quantized
from quartet.passes.state import State
from quartet.runtime.compat import OpOverload
from quartet.runtime.sizes import same
from quartet.runtime.view_ops import CAST, COPIES, aten

_PARTS = {aten.split.Tensor, aten.split_with_sizes.default}
_COLUMNS = {aten.slice.Tensor, aten.cat.default}


@graph_pass(reads=Quantized, optional=True,
            summary="what stands between two products of groups is computed of rows that stay padded")
def stay_padded(state: State) -> None:
    """Let quantisers of groups read what is computed of padded rows, instead of its rows, padded again."""
    twins: dict[Node, dict[Node, Node]] = {}  # layout → node of tokens → the same of padded rows
    with editing(state.gm) as graph:
        for pad in graph.find_nodes(op="call_function", target=PAD_GROUPS):
            source = argument(pad, "source")
            layout = maker(source)
            if layout is None or index_of(source) != SOURCE:
                continue
            moved = _Padded(layout, source, twins.setdefault(layout, {}))
            if (twin := moved.of(source_of(pad))) is not None:
                build = Builder(graph, like=pad, before=pad, backward=is_backward(pad))
                state.replace(pad, build(CLEAR_ROWS, twin, source))


class _Padded:
    """Nodes with a row a token, computed of padded rows.

    Args:
        layout: the node of the layout. source: its row → token. twins: what has been found; grows.
    """

    def __init__(self, layout: Node, source: Node, twins: dict[Node, Node]) -> None:
        self.layout, self.source, self.twins = layout, source, twins
        self.tokens = layout.meta["val"][PLACE].shape[0]

    def of(self, x: Node) -> Node | None:
        """``x`` of padded rows, where it is made of rows that products have left padded; None where it is not."""
        order: dict[Node, None] = {}
        if same(self.tokens, 1) or not self._plan(x, order) or not any(map(self._taken_out, order)):
            return None
        for node in order:
            if node not in self.twins:
                self.twins[node] = source_of(node) if self._taken_out(node) else self._again(node)
        return self.twins[x]

    def _plan(self, x: Node, order: dict[Node, None]) -> bool:
        """Whether ``x`` can be had padded; ``order`` is then what has to be, each before what is made of it."""
        if x in order:
            return True
        if not self._taken_out(x):
            if not _treats_rows_alike(x):
                return False
            for operand in x.all_input_nodes:
                if not self._has_tokens(operand):
                    if not _serves_all_rows(operand):
                        return False
                elif not (self._narrow(operand) and self.source < x or self._plan(operand, order)):
                    return False
        order[x] = None
        return True

    def _again(self, x: Node) -> Node:
        build = Builder(x.graph, like=x, before=x, backward=is_backward(x))

        def padded(operand: Node) -> Node:
            if operand in self.twins:
                return self.twins[operand]
            return build(GATHER_ROWS, operand, self.source) if self._has_tokens(operand) else operand

        return build.again(x, padded)

    def _taken_out(self, x: Node) -> bool:
        """Whether ``x`` is rows of this layout, taken out of it."""
        if x.target is not GATHER_ROWS:
            return False
        index = argument(x, "index")
        return maker(index) is self.layout and index_of(index) == PLACE

    def _has_tokens(self, x: Node) -> bool:
        sizes = _sizes(x)
        return len(sizes) == 2 and same(sizes[0], self.tokens)

    def _narrow(self, x: Node) -> bool:
        """Whether ``x`` is one number a token."""
        return same(_sizes(x)[1], 1)


def _sizes(x: Node) -> tuple[Any, ...]:
    """Of a tensor, of the first of several; none of what is no tensor."""
    value = x.meta.get("val")
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    return tuple(first.shape) if isinstance(first, torch.Tensor) else ()


def _serves_all_rows(x: Node) -> bool:
    sizes = _sizes(x)
    return len(sizes) < 2 or len(sizes) == 2 and same(sizes[0], 1)


def _treats_rows_alike(x: Node) -> bool:
    """Whether a row of the result is made of the same row of each operand, by the same function."""
    if x.target is operator.getitem:
        made = maker(x)
        return made is not None and made.target in _PARTS
    if x.target in _PARTS or x.target in _COLUMNS:
        return argument(x, "dim") in (1, -1)
    if x.target is CAST or x.target in COPIES:
        return True
    tags = x.target.tags if isinstance(x.target, OpOverload) else ()
    return torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags
