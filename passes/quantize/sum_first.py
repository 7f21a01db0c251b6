"""Add up gradients before the inverse transform and mask that they share: one pass over the sum in place of one each.

    Hᵀ(M ⊙ A) + Hᵀ(M ⊙ B)  =  Hᵀ(M ⊙ (A + B))

The gradients of an X that several layers read, as q, k and v or gate and up do, come from products in its rotated
basis; where the layers have one quantised X they have one mask and one choice of signs. The sum is rounded to the dtype
of the products, and the result of the transform once in place of once for each addend.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from quartet.lowering import ir
from quartet.lowering.ir.graph import Builder, argument, aten, editing, is_backward, remaining, shape, source_of, val
from quartet.lowering.ir.ops.grouped import GATHER_ROWS
from quartet.passes.graph_pass import graph_pass
from quartet.passes.quantize.share import frozen
from quartet.passes.sites import Quantized
from quartet.passes.state import State
from quartet.runtime.sizes import same_sizes
from quartet.runtime.view_ops import CAST, ORDERS, PARTS, RESHAPES

_LINEAR = RESHAPES | ORDERS | PARTS | {CAST, ir.HADAMARD, ir.APPLY_MASK, GATHER_ROWS}


@graph_pass(reads=Quantized, optional=True,
            summary="gradients of one X are added up before the mask and the inverse transform that they share")
def sum_first(state: State) -> None:
    """Move additions of backward before what both addends go through."""
    with editing(state.gm) as graph:
        for node in graph.find_nodes(op="call_function", target=aten.add.Tensor):
            if is_backward(node) and argument(node, "alpha") == 1:
                _move(state, node)


def _move(state: State, add: Node) -> None:
    left, right = argument(add, "self"), argument(add, "other")
    if not isinstance(left, Node) or not isinstance(right, Node) or left is right:
        return
    shared = list(_shared(left, right))
    while shared and shared[-1][0].target not in (ir.HADAMARD, ir.APPLY_MASK):
        shared.pop()
    if not any(step.target is ir.HADAMARD for step, _ in shared):
        return
    last, other = shared[-1]
    build = Builder(add.graph, like=add, before=add, backward=True)
    out = build(aten.add.Tensor, source_of(last), source_of(other))
    for step, _ in reversed(shared):
        again: Any = step.target
        out = build(again, out, *remaining(step), **step.kwargs)
    state.replace(add, out)


def _shared(left: Node, right: Node) -> Iterator[tuple[Node, Node]]:
    """The steps, the last first, by which two tensors of one layout are made of two others in the same way."""
    while _alike(left, right):
        yield left, right
        left, right = source_of(left), source_of(right)


def _alike(left: Node, right: Node) -> bool:
    """Whether two nodes that nothing else reads do the same linear thing, and lose no precision before they do it."""
    if left.target not in _LINEAR or left.target is not right.target or not _same_layout(left, right):
        return False
    if max(len(left.users), len(right.users)) > 1 or not (is_backward(left) and is_backward(right)):
        return False
    if (frozen(remaining(left)), frozen(left.kwargs)) != (frozen(remaining(right)), frozen(right.kwargs)):
        return False
    a, b = source_of(left), source_of(right)
    return _same_layout(a, b) and torch.promote_types(val(a).dtype, val(left).dtype) == val(a).dtype


def _same_layout(a: Node, b: Node) -> bool:
    return (val(a).dtype == val(b).dtype and val(a).dim() == val(b).dim() and same_sizes(shape(a), shape(b))
            and same_sizes(val(a).stride(), val(b).stride()))
