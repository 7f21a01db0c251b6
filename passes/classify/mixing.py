"""Products between scores and their softmax, or between a softmax and the values: talking heads."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from quartet.lowering.ir.graph import argument, arguments, aten, shape
from quartet.passes.matrices import MATMULS, operands
from quartet.runtime.sizes import same, same_sizes
from quartet.runtime.view_ops import COPIES, ORDERS, RESHAPES

_SHOWN = RESHAPES | COPIES | {aten.expand.default}


def mixed_heads(node: Node) -> Node | None:
    """Of a product that mixes the heads of scores ``[batch, heads, queries, keys]`` by a matrix ``[heads, heads]``, the
    scores as it reads them; None of any other node. Each of its results is of one query and one key, as its operands
    are. A linear layer, ``matmul``, ``einsum`` and a 1×1 convolution are told."""
    if node.target is aten.convolution.default:
        return _convolved(node)
    if node.target not in MATMULS:
        return None
    a, b = operands(node)
    for scores, weight, contracted, end in ((a, b, -1, -1), (b, a, -2, 0)):
        heads, order = shape(scores)[contracted], _order(scores)
        if order and order[end] not in (2, 3) and same_sizes(_long(_stored(weight)), (heads, heads)):
            return scores
    return None


def _convolved(node: Node) -> Node | None:
    """The scores whose heads are the channels of a 1×1 convolution; None of an image, which has lines of pixels."""
    given = arguments(node)
    scores, weight = given["input"], given["weight"]
    heads = shape(scores)[1]
    plain = not given["transposed"] and all(stride == 1 for stride in given["stride"]) and not any(given["padding"])
    if not plain or len(shape(scores)) != 4 or not same_sizes(shape(weight), (heads, heads, 1, 1)):
        return None
    at, pairs = scores, shape(scores)[-2:]
    while at.target not in MATMULS and at.op == "call_function":
        above = [n for n in at.all_input_nodes if same_sizes(shape(n)[-2:], pairs)]
        if not above:
            return None
        at = above[0]
    return scores


def _order(node: Node) -> list[int]:
    """In which order an operand has the axes of a tensor of four that was permuted for it, without those of size 1;
    nothing of another operand."""
    while node.target in _SHOWN:
        node = node.all_input_nodes[0]
    orders: list[list[int]] = []
    while not (orders and len(shape(node)) == 4):
        if node.target is aten.permute.default:
            size = shape(node.all_input_nodes[0])
            long = _long_axes(size)
            orders.append([long.index(axis % len(size)) for axis in argument(node, "dims") if axis % len(size) in long])
        elif node.target not in _SHOWN or not same_sizes(_long(node), _long(node.all_input_nodes[0])):
            return []
        node = node.all_input_nodes[0]
    made = _long_axes(shape(node))
    for order in reversed(orders):
        made = [made[i] for i in order]
    return made


def _stored(node: Node) -> Node:
    while node.target in _SHOWN | ORDERS:
        node = node.all_input_nodes[0]
    return node


def _long_axes(size: tuple[Any, ...]) -> list[int]:
    return [axis for axis, length in enumerate(size) if not same(length, 1)]


def _long(node: Node) -> list[Any]:
    return [length for length in shape(node) if not same(length, 1)]
