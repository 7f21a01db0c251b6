"""What a partitioned pair of graphs keeps between forward and backward: which node, in which storage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from quartet.lowering.ir.graph import aten, maker, outputs, shape, source, source_of, val
from quartet.runtime.compat import OpOverload
from quartet.runtime.sizes import hint, same, same_sizes
from quartet.runtime.view_ops import CAST

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass
class Kept:
    """One value that forward leaves for backward: its node there, and the input of backward that is it."""

    made: Node
    read: Node


@dataclass
class Storage:
    """Everything kept that is a view or an exact cast of one tensor, which is computed by ``root``."""

    root: Node
    parts: list[Kept] = field(default_factory=list)

    @property
    def source(self) -> Node:
        """What to encode: a dense part that is alone, unless its rows are shorter; else what all parts come from."""
        alone = self.parts[0].made
        if len(self.parts) > 1 or not dense_order(alone):
            return self.root
        return max((alone, self.root), key=_row)


def returned(gm: GraphModule) -> Sequence[Any]:
    return outputs(gm.graph)


def is_symbol(node: Any) -> bool:
    return isinstance(node, Node) and isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool)


def pairs(forward: GraphModule, backward: GraphModule, outputs: int) -> list[Kept]:
    """What follows forward's first ``outputs`` results, beside the input of backward that receives it.

    AOTAutograd hands over symbolic sizes first, then the rest in the order of forward's results.
    """
    left = returned(forward)[outputs:]
    ordered = [n for n in left if is_symbol(n)] + [n for n in left if not is_symbol(n)]
    inputs = backward.graph.find_nodes(op="placeholder")
    found = []
    for made, read in zip(ordered, inputs, strict=False):
        if isinstance(made, Node) and isinstance(made.meta.get("val"), torch.Tensor):
            there, here = made.meta["val"], read.meta.get("val")
            if not isinstance(here, torch.Tensor) or here.dtype != there.dtype or (
                    not same_sizes(here.shape, there.shape)):
                raise RuntimeError(f"the partitioner's graphs disagree: forward leaves {made.name} "
                                   f"{tuple(there.shape)} {there.dtype} where backward takes {read.name} {here}")
            found.append(Kept(made, read))
    return found


def storages(kept: Sequence[Kept]) -> list[Storage]:
    """The kept tensors by the storage they come from, in order; a narrower cast joins a kept tensor it was made of."""
    found: dict[Node, Storage] = {}
    for one in kept:
        found.setdefault(root := origin(one.made), Storage(root)).parts.append(one)
    for root in list(found):
        if root.target is CAST:
            wider = origin(source_of(root))
            if wider in found and wider is not root and val(wider).dtype in FLOATS and val(root).dtype in FLOATS:
                found[wider].parts += found.pop(root).parts
    return list(found.values())


def shown_roots(results: Sequence[Any]) -> set[Node]:
    """What the user's own results are views or casts of."""
    shown = [n for n in results if isinstance(n, Node) and not is_symbol(n)]
    return {storage.root for storage in storages([Kept(n, n) for n in shown])}


def origin(node: Node) -> Node:
    """The node that computes what ``node`` is a view or an exact cast of; a cast of an input is computed itself."""
    cast = None
    while True:
        if (above := above_view(node)) is not None:
            node = above
        elif widens(node):
            cast, node = node, node.all_input_nodes[0]
        else:
            break
    return cast if node.op == "placeholder" and cast is not None else node


def above_view(node: Node) -> Node | None:
    """What ``node`` is a view of; None when it is none."""
    by = maker(node)
    return source(node) if is_view_op(node.target if by is None else by.target) else None


def is_view_op(target: Any) -> bool:
    """Whether the results of an operator share their storage with its first argument."""
    if not isinstance(target, OpOverload):
        return False
    alias = target._schema.returns[0].alias_info if target._schema.returns else None
    return target is aten._unsafe_view.default or (alias is not None and not alias.is_write)


def widens(node: Node) -> bool:
    """Whether a node is a cast that loses nothing."""
    if node.target is not CAST:
        return False
    before, after = val(source_of(node)).dtype, val(node).dtype
    return before in FLOATS and after in FLOATS and before.itemsize < after.itemsize


def chain(made: Node, source: Node) -> Iterator[Node]:
    """The views and casts that lead from ``source`` to ``made``, in the order they are computed."""
    links = []
    while made is not source:
        links.append(made)
        made = source_of(made)
    return reversed(links)


def _row(node: Node) -> int:
    """Elements along the innermost axis; 0 of a tensor that is not dense."""
    order = dense_order(node)
    return hint(shape(node)[order[-1]]) if order else 0


def byte_count(node: Node) -> int:
    return hint(val(node).numel()) * val(node).element_size()


def dense_order(node: Node) -> list[int] | None:
    """The axes of a tensor from the outermost to the innermost in memory; None when it has gaps or overlaps."""
    sizes, strides = shape(node), val(node).stride()
    order = sorted(range(len(sizes)), key=lambda i: (-hint(strides[i]), -hint(sizes[i]), i))
    expected: Any = 1
    for axis in reversed(order):
        if isinstance(sizes[axis], int) and sizes[axis] == 1:
            continue
        if not same(strides[axis], expected):
            return None
        expected = expected * sizes[axis]
    return order or None


def stored_bytes(storage: Storage) -> int:
    """What a storage takes now: views share it, or hold a part of it; a cast lies in memory of its own."""
    total = 0
    for dtype in dict.fromkeys(val(part.made).dtype for part in storage.parts):
        whole = hint(val(storage.root).numel()) * dtype.itemsize
        total += min(whole, sum(byte_count(part.made) for part in storage.parts if val(part.made).dtype is dtype))
    return total
