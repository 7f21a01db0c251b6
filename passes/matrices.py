"""The matrices behind the operands of a product, through views that keep a matrix a matrix."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from quartet.lowering.ir.graph import argument, arguments, aten, shape, source
from quartet.runtime.sizes import same_sizes
from quartet.runtime.view_ops import RESHAPES, SAME

Operand = tuple[Node, bool]  # and whether it is stored transposed
ADDS = (aten.addmm.default, aten.baddbmm.default)
MATMULS = (aten.mm.default, aten.bmm.default, *ADDS)


def canonical(node: Node) -> tuple[Node, bool]:
    """Walk up through views that keep a matrix a matrix, or a batch of them one: (origin, whether ``node`` is its
    transpose)."""
    flipped = False
    while (above := source(node)) is not None and hasattr(above.meta.get("val"), "shape"):
        before, after = shape(above), shape(node)
        if node.target in SAME:
            pass
        elif node.target is aten.t.default:
            flipped = not flipped
        elif node.target is aten.permute.default and _swaps(argument(node, "dims")):
            flipped = not flipped
        elif node.target is aten.transpose.int and _matrix(before) == 2:
            flipped = not flipped
        elif node.target in RESHAPES and _same_matrix(before, after):
            pass
        else:
            break
        node = above
    return node, flipped


def _matrix(size: tuple[Any, ...]) -> int:
    """2 for a matrix, also one with a leading batch of 1; else 0."""
    return 2 if len(size) == 2 or (len(size) == 3 and isinstance(size[0], int) and size[0] == 1) else 0


def _swaps(order: Any) -> bool:
    return list(order) in ([1, 0], [0, 2, 1])


def _same_matrix(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return _matrix(a) == 2 and _matrix(b) == 2 and same_sizes(a[-2:], b[-2:])


def operands(node: Node) -> tuple[Node, Node]:
    """A and B of a product A·B."""
    given, names = arguments(node), ("mat1", "mat2") if node.target is aten.addmm.default else ("batch1", "batch2")
    return (given[names[0]], given[names[1]]) if node.target in ADDS else (given["self"], given["mat2"])
