"""The three kinds of products ``A · Bᵀ`` in a graph: of two matrices, of batches, of groups of tokens.

Batches are matrices of one size below each other. Groups are rows of A, each with a matrix of its own in B; over tokens
the product contracts each group's, and the results lie below each other.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from quartet.lowering.ir.graph import Builder, argument, aten, shape, source, source_of
from quartet.lowering.ir.operands import Kind
from quartet.lowering.ir.ops.grouped import GROUPED_MM
from quartet.runtime.view_ops import SAME

SWAP = [0, 2, 1]


def multiply(build: Builder, kind: Kind, a: Node, b: Node) -> Node:
    """``A · Bᵀ`` in the operands' dtype."""
    if kind.ends is not None:
        return build(GROUPED_MM, a, b, kind.ends, kind.over_tokens)
    if kind.batch is None:
        return build(aten.mm.default, a, build.transpose(b))
    right = build(aten.permute.default, stacked(build, kind.batch, b), SWAP)
    return flat(build, build(aten.bmm.default, stacked(build, kind.batch, a), right))


def turned(build: Builder, count: Any, x: Node) -> Node:
    """``[count·cols, rows]`` of ``count`` matrices that lie below each other, ``[count·rows, cols]``."""
    return flat(build, build(aten.permute.default, stacked(build, count, x), SWAP))


def unturned(x: Node) -> tuple[Node, Any] | None:
    """What ``x`` is :func:`turned` of, and how many matrices there are; None where it is not."""
    swapped = turned_stack(x)
    stack = None if swapped is None else source_of(swapped)
    if stack is None or stack.target is not aten.reshape.default or len(shape(source_of(stack))) != 2:
        return None
    return source_of(stack), shape(stack)[0]


def turned_stack(x: Node) -> Node | None:
    """``[count, cols, rows]``, each matrix transposed, which ``x`` shows below each other; None where it does not."""
    swapped = source(x) if x.target is aten.reshape.default else None
    return swapped if swapped is not None and _swaps(swapped) else None


def shown_stack(x: Node) -> tuple[Node, bool] | None:
    """``[count, rows, cols]`` whose matrices ``x`` shows below each other, and whether each is transposed; None where
    it shows none."""
    stack, flipped = source(x) if x.target is aten.reshape.default else None, False
    while stack is not None and (stack.target in SAME or _swaps(stack)):
        stack, flipped = source_of(stack), flipped != _swaps(stack)
    return (stack, flipped) if stack is not None and len(shape(stack)) == 3 else None


def _swaps(x: Node) -> bool:
    return x.target is aten.permute.default and argument(x, "dims") == SWAP


def stacked(build: Builder, count: Any, x: Node) -> Node:
    """``[count, rows, cols]`` of ``[count·rows, cols]``."""
    return build(aten.reshape.default, x, [build.size(count), -1, build.size(shape(x)[1])])


def flat(build: Builder, x: Node) -> Node:
    """``[count·rows, cols]`` of ``[count, rows, cols]``."""
    return build(aten.reshape.default, x, [-1, build.size(shape(x)[-1])])
