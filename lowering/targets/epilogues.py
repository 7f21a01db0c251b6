"""What follows a product in the rotated basis: apply_mask → inverse hadamard → first columns, as one fused op."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from quartet.lowering import ir
from quartet.lowering.ir.graph import Builder, argument, aten, editing, is_backward, shape, source_of, val
from quartet.lowering.ir.ops.fused import UNROTATE
from quartet.lowering.ir.views import ApplyMask, Hadamard

LANES = 32  # columns that the kernels take at a time


@dataclass(frozen=True)
class Epilogue:
    """apply_mask → inverse hadamard → first columns after a product or a sum, each the only reader of the last.

    Args:
        mask: packed bits, or None. rotation, signs: of the inverse Hadamard, 0 and None without one.
        dtype: of the result. last: the node whose value it is.
    """

    mask: Node | None
    rotation: int
    signs: Node | None
    dtype: torch.dtype
    last: Node

    @staticmethod
    def of(gemm: Node) -> Epilogue | None:
        """What follows ``gemm``, or None where nothing does that a kernel could take."""
        mask = unrotate = None
        last = gemm
        user = _only_user(last)
        if user is not None and user.target is ir.APPLY_MASK:
            mask, last = ApplyMask.of(user).mask, user
            user = _only_user(last)
        if user is not None and user.target is ir.HADAMARD and Hadamard.of(user).inverse:
            unrotate, last = Hadamard.of(user), user
            user = _only_user(last)
        if last is not gemm and user is not None and _first_columns(user):
            last = user
        if last is gemm:
            return None
        width = val(gemm).shape[1]
        if mask is not None and (not isinstance(width, int) or val(mask).shape[1] * 8 != width):
            return None
        if unrotate is None:
            return Epilogue(mask, 0, None, val(gemm).dtype, last)
        return Epilogue(mask, unrotate.n, unrotate.signs, unrotate.dtype, last)

    def takes(self, width: int | torch.SymInt) -> bool:
        """Whether the kernels take a product of so many columns."""
        return isinstance(width, int) and width % max(LANES, self.rotation) == 0


def finish(build: Builder, gemm: Node, out: Node, gain: float, follows: Epilogue | None) -> None:
    """Put ``out · gain`` in place of ``gemm``, together with what follows it, as one ``unrotate`` op, where given."""
    if follows is None:
        out = build.columns(out, shape(gemm)[1])
        out = build(aten.mul.Tensor, out, gain) if gain != 1.0 else out
        gemm.replace_all_uses_with(build.cast(out, val(gemm).dtype))
        return
    last = follows.last
    at = Builder(build.graph, like=last, before=last, backward=is_backward(last))
    last.replace_all_uses_with(at(UNROTATE, out, follows.mask, follows.rotation, follows.signs, gain,
                                  at.size(shape(last)[1]), follows.dtype))


def lower_sums(gm: GraphModule, has_kernel: Callable[[torch.device], bool]) -> None:
    """The same of sums of products (``passes/quantize/sum_first.py``), on devices where a kernel does it.

    What the products are multiplied by, if it is one number, is left to that kernel.
    """
    found = []
    for node in gm.graph.find_nodes(op="call_function", target=aten.add.Tensor):
        follows = Epilogue.of(node) if is_backward(node) and val(node).dim() == 2 else None
        if follows is not None and follows.rotation and has_kernel(val(node).device) and follows.takes(shape(node)[1]):
            found.append((node, follows))
    if not found:
        return
    with editing(gm) as graph:
        for node, follows in found:
            build = Builder(graph, like=node, before=node, backward=True)
            gains = {argument(leaf, "other") if _is_multiple(leaf) else 1.0 for leaf in _addends(node)}
            gain = gains.pop() if len(gains) == 1 else 1.0
            finish(build, node, _sum(build, node) if gain != 1.0 else node, gain, follows)


def _addends(total: Node) -> Iterator[Node]:
    """What a sum adds up, sums in it that nothing else reads taken apart."""
    for addend in total.all_input_nodes:
        if addend.target is aten.add.Tensor and len(addend.users) == 1:
            yield from _addends(addend)
        else:
            yield addend


def _sum(build: Builder, total: Node) -> Node:
    """The sum of what the addends are multiples of."""
    parts = [source_of(addend) for addend in _addends(total)]
    out = parts[0]
    for part in parts[1:]:
        out = build(aten.add.Tensor, out, part)
    return out


def _is_multiple(node: Node) -> bool:
    return node.target is aten.mul.Tensor and isinstance(argument(node, "other"), float) and len(node.users) == 1


def _first_columns(node: Node) -> bool:
    return node.target is aten.slice.Tensor and (argument(node, "dim"), argument(node, "start")) == (1, 0)


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
