"""The three kinds of products ``A · Bᵀ`` in a graph: of two matrices, of batches, of groups of tokens.

Batches are matrices of one size below each other. Groups are rows of A, each with a matrix of its own in B; over tokens
the product contracts each group's, and the results lie below each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from quartet.lowering import ir
from quartet.lowering.ir.graph import Builder, aten, shape, val
from quartet.lowering.ir.grouped import GROUPED_MM, SCALED_GROUPED_MM

SCALED = (*ir.PRODUCTS, SCALED_GROUPED_MM)
SWAP = [0, 2, 1]
_OWN = {ir.SCALED_MM: 0, ir.SCALED_BMM: 1, SCALED_GROUPED_MM: 2}  # arguments behind the dtype that tell the kind


@dataclass(frozen=True)
class Kind:
    """Which of the three a product is.

    Args:
        batch: how many matrices lie below each other in A, in B and in the result.
        ends: where each group ends along the tokens. over_tokens: whether tokens are contracted.
    """

    batch: Any = None
    ends: Node | None = None
    over_tokens: bool = False

    @staticmethod
    def of(gemm: Node) -> Kind:
        """The kind of a node of the semantic IR."""
        own = gemm.args[7 : 7 + _OWN[gemm.target]]  # type: ignore[index]
        if gemm.target is ir.SCALED_BMM:
            return Kind(batch=val(own[0]) if isinstance(own[0], Node) else own[0])
        return Kind(None, *own) if own else Kind()  # type: ignore[arg-type]

    @property
    def single(self) -> bool:
        return self.batch is None and self.ends is None


def amaxes(gemm: Node) -> tuple[Any, ...]:
    """The largest magnitudes of operands that a node of the semantic IR was given, none or two, each a node or None."""
    return tuple(gemm.args[7 + _OWN[gemm.target] :])  # type: ignore[index]


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
    swapped = x.args[0] if x.target is aten.reshape.default else None
    if not isinstance(swapped, Node) or swapped.target is not aten.permute.default or swapped.args[1] != SWAP:
        return None
    stack = swapped.args[0]
    if not isinstance(stack, Node) or stack.target is not aten.reshape.default or len(shape(stack.args[0])) != 2:  # type: ignore[arg-type]
        return None
    return stack.args[0], shape(stack)[0]  # type: ignore[return-value]


def stacked(build: Builder, count: Any, x: Node) -> Node:
    """``[count, rows, cols]`` of ``[count·rows, cols]``."""
    return build(aten.reshape.default, x, [build.size(count), -1, build.size(shape(x)[1])])


def flat(build: Builder, x: Node) -> Node:
    """``[count·rows, cols]`` of ``[count, rows, cols]``."""
    return build(aten.reshape.default, x, [-1, build.size(shape(x)[-1])])
