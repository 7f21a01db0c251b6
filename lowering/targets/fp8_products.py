"""Products of row-major FP8 codes on the FP8 tensor cores: of matrices by ``aten._scaled_mm``, of groups and, some
hundreds at a time, of batches by ``aten._scaled_grouped_mm``.

The latter takes E4M3 alone, with a scale a row, and gives bfloat16. Both want K and N in multiples of 16, what is
missing is padded with zeros, and groups of tokens that are contracted in multiples of 16 too, which is the layout's
business. Rows of a result behind the last group hold anything.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from quartet.kernels.spec import QuantSpec
from quartet.lowering import ir
from quartet.lowering.ir.graph import BACKWARD, Builder, aten, set_argument, shape, val
from quartet.lowering.ir.operands import Kind
from quartet.lowering.ir.ops import experts as expert_ops
from quartet.lowering.ir.ops import fp8 as fp8_ops
from quartet.lowering.ir.products import SWAP, flat, stacked, turned_stack, unturned
from quartet.runtime.compat import OpOverload
from quartet.runtime.devices import Target
from quartet.runtime.sizes import same, same_sizes, unbacked

ALIGN = 16
_OURS = "quartet_product"  # marks a product that is not the user's own
_FAST = {aten._scaled_mm.default: "use_fast_accum", aten._scaled_grouped_mm.default: "use_fast_accum",
         fp8_ops.MM: "fast", fp8_ops.BMM: "fast", expert_ops.MM: "fast"}


def supports_kind(target: Target, product: OpOverload) -> str | None:
    """None where the device has FP8 products of this kind, one of ``operands.SCALED``, else why not."""
    return None if product is ir.SCALED_MM else target.lacks("fp8 grouped products")


def supports_pair(a: QuantSpec, b: QuantSpec) -> str | None:
    """None when the tensor cores multiply the two formats, else why not."""
    if a.element == b.element == "e5m2":
        return "the tensor cores have no product of e5m2 and e5m2; make one operand e4m3"
    return None


def multiply(build: Builder, kind: Kind, a: Node, a_scales: Any, b: Node, b_scales: Any, dtype: Any,
             aligned: bool = False) -> Node:
    """``A · Bᵀ`` of row-major codes, its columns rounded up to 16.

    Args:
        a, b: matrices, or matrices below each other, as the kind of product has them.
        a_scales, b_scales: fp32, one a row ``[rows, 1]`` or one of the tensor ``[1, 1]``; over the tokens of groups
            also ``[rows, groups]``. With one of each the tensor's is repeated for every row.
        aligned: K is a multiple of 16 whatever it is.
    """
    cols = 1 if aligned else ALIGN
    if kind.single:
        return _matrices(build, a, a_scales, b, b_scales, dtype, cols)
    a_scales, b_scales = per_row(build, a, a_scales), per_row(build, b, b_scales)
    if kind.over_tokens:
        assert kind.ends is not None
        groups = shape(kind.ends)[0]
        right = build.transpose(build.padded(b, rows=ALIGN))
        left_scales = _each_group(build, a_scales, groups)
        right_scales = _each_group(build, build.padded(b_scales, rows=ALIGN), groups)
        return flat(build, _grouped(build, a, right, left_scales, right_scales, kind, dtype))
    count = kind.batch if kind.ends is None else shape(kind.ends)[0]
    left, each = build.padded(a, cols=cols), build.padded(stacked(build, count, b), rows=ALIGN, cols=cols)
    b_scales = build.padded(_in_rows(build, b_scales, count), cols=ALIGN)
    if kind.ends is None:
        left, a_scales = stacked(build, count, left), _in_rows(build, a_scales, count)
        return flat(build, marked(build(fp8_ops.BMM, left, each, a_scales, b_scales, dtype, True)))
    a_scales = build(aten.reshape.default, a_scales, [-1])
    return _grouped(build, left, build(aten.permute.default, each, SWAP), a_scales, b_scales, kind, dtype)


def promote(graph: Graph) -> None:
    """Let our products accumulate in fp32 every 128 elements of K, and not in the tensor cores' shorter registers.

    Relative error of a product of exact operands on an H200: 2.1e-3 (K = 4096) to 3.5e-3 (16384) fast, 1.7e-3
    promoted, which is the rounding of a bf16 output; the promoted product takes 10 to 15 % longer.
    """
    for target, name in _FAST.items():
        for node in graph.find_nodes(op="call_function", target=target):
            if _OURS in node.meta:
                set_argument(node, name, False)


def row_major(build: Builder, codes: Node, copies: dict[Node, Node]) -> Node:
    """``codes`` with rows one after another: as they are, or one copy, shared by what reads it in backward."""
    stack = turned_stack(codes) if unturned(codes) is not None else None
    if stack is None and same_sizes(val(codes).stride(), (shape(codes)[1], 1)):
        return codes
    backward = build.meta["partitioner_tag"] == BACKWARD
    copy = copies.get(codes) if backward else None
    if copy is None:
        copy = build(fp8_ops.ROW_MAJOR, codes if stack is None else stack)
        copy = copy if stack is None else flat(build, copy)
        if backward:
            copies[codes] = copy
    return copy


def _matrices(build: Builder, a: Node, a_scales: Any, b: Node, b_scales: Any, dtype: Any, cols: int) -> Node:
    if any(not isinstance(r, int) or r != 1 for r in (shape(a_scales)[0], shape(b_scales)[0])):
        a_scales, b_scales = per_row(build, a, a_scales), per_row(build, b, b_scales)
        b_scales = build.transpose(build.padded(b_scales, rows=ALIGN))
    a, b = build.padded(a, cols=cols), build.padded(b, rows=ALIGN, cols=cols)
    if any(map(unbacked, shape(a))):
        return marked(build(fp8_ops.MM, a, b, a_scales, b_scales, dtype, True))
    return marked(build(aten._scaled_mm.default, a, build.transpose(b), a_scales, b_scales, None, None, dtype, True))


def _grouped(build: Builder, left: Node, right: Node, left_scales: Node, right_scales: Node, kind: Kind,
             dtype: Any) -> Node:
    return marked(build(aten._scaled_grouped_mm.default, left, right, left_scales, right_scales, kind.ends, None, None,
                         dtype, True))


def marked(node: Node) -> Node:
    """``node``, a product of ours, as :func:`promote` finds it."""
    node.meta[_OURS] = True
    return node


def per_row(build: Builder, codes: Node, scales: Node) -> Node:
    """fp32 ``[rows, 1]`` of one a row or one of the tensor."""
    if same(shape(scales)[0], shape(codes)[0]):
        return scales
    every = build(aten.expand.default, scales, [build.size(shape(codes)[0]), 1])
    return build(aten.clone.default, every, memory_format=torch.contiguous_format)


def _in_rows(build: Builder, scales: Node, count: Any) -> Node:
    """``[count, rows]`` of ``[count·rows, 1]``."""
    return build(aten.reshape.default, scales, [build.size(count), -1])


def _each_group(build: Builder, scales: Node, groups: Any) -> Node:
    """``[groups · rows]`` of ``[rows, groups]``, or of ``[rows, 1]`` for all of them."""
    every = build(aten.expand.default, build.transpose(scales), [build.size(groups), -1])
    return build(aten.reshape.default, every, [-1])
