"""Output heads: the last layers of a model, told by structure and not by their names or by the loss.

What a head computes reaches the results of the graph, or a loss in it, and no layer on the way; and no layer of the
model reads vectors of its width. So a residual stack's last projection is none (the next block would read it), neither
is a layer at the end of a part of a model that is compiled in several graphs.
"""

from __future__ import annotations

from collections.abc import Collection
from math import prod
from typing import Any

from torch.fx import Node

from quartet.lowering.ir.graph import aten, shape
from quartet.passes.flow import Flow
from quartet.passes.matrices import MATMULS, operands
from quartet.runtime.sizes import hint
from quartet.runtime.view_ops import VIEWS

_PIECES = VIEWS | {aten.clone.default, aten._to_copy.default}
_CASTS_AND_SPLITS = ("prims.convert_element_type", "aten.split", "aten.unbind", "<built-in function getitem")


def is_head(node: Node, n: Any, flow: Flow, read: Collection[int], complete: bool = False) -> bool:
    """Whether the product ``node`` of a module's weight, with ``n`` output features, is an output head.

    ``read``: the input widths of the model's layers. ``complete``: what the graph returns, the model does, so that no
    layer reads it later and those beside the product tell nothing of it.
    """
    if not _is_last(node, flow) or n in read or _parts(node, n, flow) & set(read):
        return False
    return complete or not any(_is_last(other, flow) and shape(other)[-1] in read for other in _siblings(node, flow))


def _is_last(node: Node, flow: Flow) -> bool:
    return node in flow.leaves and node not in flow.read


def _siblings(node: Node, flow: Flow) -> list[Node]:
    """The other layers that read the same X, such as those of queries beside those of keys."""
    x = _source(node)
    return [other for other in flow.layers if other is not node and other.target in MATMULS and _source(other) is x]


def _source(node: Node) -> Node:
    """X of a product of X with a weight, without its views."""
    at = operands(node)[0]
    while at.target in _PIECES:
        at = at.all_input_nodes[0]
    return at


def _parts(node: Node, n: Any, flow: Flow) -> set[int]:
    """The widths of the parts in which the graph returns a fused layer's result; empty where it is one."""
    width, elements = hint(n), prod(map(hint, shape(node)))
    if not elements:
        return set()
    parts, waiting = list[int](), [node]
    while waiting:
        at = waiting.pop()
        for user in at.users:
            if user.op == "output":
                parts.append(prod(map(hint, shape(at))))
            elif user in flow.order and (user.target in _PIECES or str(user.target).startswith(
_CASTS_AND_SPLITS)):
                waiting.append(user)
    fused = len(parts) > 1 and sum(parts) == elements
    return {part * width // elements for part in parts} if fused else set()
