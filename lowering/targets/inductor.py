"""How Inductor lowers a semantic op that no kernel took: the reference, traced and inlined into its IR.

What is inlined fuses with its neighbours. Two things make the result quick to compile and to run:

- Blocks are kept as ``[block, rows, blocks]``, so that the butterfly, the sums of a block and the packing are
  loops over whole contiguous rows, each element of a block at a constant offset.
- ``quartet::store`` marks what is computed once and kept in memory. Between two marks Inductor fuses freely.

The order of all floating point operations is that of the reference. Each (op, constants, shapes) is traced once a
process.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from quartet.kernels import extension, reference
from quartet.kernels.spec import QuantSpec
from quartet.lowering import ir
from quartet.lowering.ir import grouped as grouped_ops
from quartet.lowering.ir import saved as saved_ops
from quartet.lowering.ir import weights as weight_ops
from quartet.lowering.ir.graph import Builder, aten, shape, val
from quartet.lowering.targets.blackwell import block_scaled_ops
from quartet.runtime import compat
from quartet.runtime.sizes import unbacked

RADICES = {16: (4, 4), 32: (8, 4), 64: (8, 8), 128: (8, 4, 4)}

_traced: dict[Any, GraphModule] = {}

ir.library.define("store(Tensor x) -> Tensor", tags=(torch.Tag.flexible_layout,))
ir.library.impl("store", lambda x: x.clone(memory_format=torch.contiguous_format), "CompositeExplicitAutograd")
torch.library.register_fake("quartet::store", lambda x: x.new_empty(x.shape), lib=ir.library)
store = torch.ops.quartet.store.default


def _store_blocks(x: Tensor) -> Tensor:
    """Keep ``[rows, blocks, block]`` in memory with its last axis first; keep anything else as it is."""
    return store(x.permute(2, 0, 1)).permute(1, 2, 0) if x.ndim == 3 else store(x)


def _store_scales(x: Tensor) -> Tensor:
    """Keep what has one number a block in memory, blocks not."""
    return x if x.ndim == 3 else store(x)


def hadamard(x: Tensor, n: int, signs: Tensor | None, inverse: bool, dtype: torch.dtype) -> Tensor:
    """The reference's butterfly in stages of 4 or 8, each one loop: the same sums in the same order.

    ``a − b`` is written as ``a + (−1)·b``, which is the same number, so that both halves are one expression.
    """
    x = reference.pad_last(x.to(torch.float32), n)
    rows, cols = x.shape
    y = store(x.reshape(rows, cols // n, n).permute(2, 0, 1))
    across = None if signs is None else signs.reshape(n, 1, 1)
    if across is not None and not inverse:
        y = y * across
    plus_minus = 1.0 - 2.0 * torch.arange(2, dtype=torch.float32, device=x.device)
    inner = n
    for radix in RADICES[n]:
        inner //= radix
        levels = radix.bit_length() - 1
        y = y.reshape(n // (radix * inner), *(2,) * levels, inner, rows, cols // n)
        for axis in range(1, levels + 1):
            sign = plus_minus.reshape(2, *(1,) * (y.ndim - 1 - axis))
            y = y.narrow(axis, 0, 1) + y.narrow(axis, 1, 1) * sign
        if inner == 1:
            y = y * (1.0 / n**0.5)
            if across is not None and inverse:
                y = y * across.reshape(y.shape[0], *(2,) * levels, 1, 1, 1)
        y = store(y)
    return y.reshape(n, rows, cols // n).permute(1, 2, 0).reshape(rows, cols).to(dtype)


def _quantize(x: Tensor, spec: str, seed: Tensor | None, site: int, amax: Tensor | None = None) -> ir.Three:
    """The reference with its random bits from an op of their own: Philox inlined would be computed 16 times over.

    On a GPU blocks are not kept where codes are not packed, which halves the time of MXFP8 and of FP8 in blocks. Codes
    are always kept: their readers want them row by row.
    """
    q = QuantSpec.parse(spec)
    whole = x.is_cuda and not q.packed and not q.mask
    bits = None
    if seed is not None:
        shape = reference.random_shape(q, x.shape[0], ir.ceil_to(x.shape[1], q.multiple))
        bits = torch.ops.quartet.random_bits(seed, site, *shape)
    codes, scales, mask = reference.quantize(x, q, seed, site, bits, _store_scales if whole else _store_blocks, amax)
    return store(codes), scales, store(mask) if q.mask else mask


def _fields(packed: Tensor, width: int) -> Tensor:
    """Every byte as its 8/width fields, lowest first, along the last axis: one expression, where a stack is many."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & ((1 << width) - 1)).flatten(-2)


def _nibbles(packed: Tensor) -> Tensor:
    return _fields(packed, 4)


def _dequantize(codes: Tensor, scales: Tensor, spec: str, dtype: torch.dtype, amax: Tensor | None = None) -> Tensor:
    return reference.dequantize(codes, scales, QuantSpec.parse(spec), dtype, _nibbles, amax)


def _apply_mask(x: Tensor, mask: Tensor) -> Tensor:
    cols = x.shape[1]
    return reference.apply_mask(x, mask, lambda packed: _fields(packed, 1)[:, :cols] != 0)


def _scaled_mm(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, a_spec: str, b_spec: str,
               dtype: torch.dtype, a_amax: Tensor | None = None, b_amax: Tensor | None = None) -> Tensor:
    specs = QuantSpec.parse(a_spec), QuantSpec.parse(b_spec)
    return reference.scaled_mm(a, a_scales, b, b_scales, *specs, dtype, _nibbles, a_amax, b_amax)


def _scaled_bmm(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, a_spec: str, b_spec: str,
                dtype: torch.dtype, batch: Any, a_amax: Tensor | None = None, b_amax: Tensor | None = None) -> Tensor:
    specs = QuantSpec.parse(a_spec), QuantSpec.parse(b_spec)
    return reference.scaled_bmm(a, a_scales, b, b_scales, *specs, dtype, batch, _nibbles, a_amax, b_amax)


_DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    ir.FIXED_SIGNS: ir.fixed_signs,
    ir.HADAMARD: hadamard,
    ir.AMAX: reference.largest_magnitude,
    ir.QUANTIZE: _quantize,
    ir.DEQUANTIZE: _dequantize,
    ir.APPLY_MASK: _apply_mask,
    ir.SCALED_MM: _scaled_mm,
    ir.SCALED_BMM: _scaled_bmm,
    block_scaled_ops.SWIZZLE: block_scaled_ops.swizzle,
    **saved_ops.DECOMPOSITIONS,
    **grouped_ops.DECOMPOSITIONS,
    **weight_ops.DECOMPOSITIONS,
}


def _inline(op: Any, node: Node, operands: tuple[Any, ...]) -> Any:
    """Inductor IR of ``op`` applied to ``operands``; ``node`` is the graph node being lowered."""
    values = [a.meta["val"] for a in node.args if isinstance(a, Node)]
    constants = map_arg(node.args, lambda n: None)
    shapes = tuple((str(tuple(v.shape)), str(v.stride()), v.dtype, str(v.device)) for v in values)
    key = (op, str(constants), extension.changes(), shapes)
    if key not in _traced or any(isinstance(s, torch.SymInt) for v in values for s in v.shape):

        def call(*tensors: Tensor) -> Any:
            given = iter(tensors)
            return _DECOMPOSITIONS[op](*(next(given) if isinstance(a, Node) else a for a in node.args))

        _traced[key] = _with_known_strides(compat.trace(call, values))
    inputs = [value for value, arg in zip(operands, node.args, strict=True) if isinstance(arg, Node)]
    return compat.inline_into_inductor(_traced[key], inputs)


def _with_known_strides(gm: GraphModule) -> GraphModule:
    """Keep what a product reads with the sizes that only the data decides as its outermost ones.

    Inductor sorts the strides of a product's operands, and no stride is then made of such a size.
    """
    for node in (n for n in gm.graph.nodes if n.target in (aten.mm.default, aten.bmm.default)):
        for operand in node.all_input_nodes:
            if any(map(unbacked, val(operand).stride())):
                order = sorted(range(val(operand).dim()), key=lambda dim: not unbacked(shape(operand)[dim]))
                build = Builder(gm.graph, like=node, before=node, backward=False)
                kept = build(store, build(aten.permute.default, operand, order))
                back = build(aten.permute.default, kept, [order.index(dim) for dim in range(len(order))])
                node.replace_input_with(operand, back)
    return gm


def register() -> None:
    """Teach Inductor the decompositions of the semantic ops."""
    for op in _DECOMPOSITIONS:
        compat.register_inductor_lowering(op, partial(_inline, op))
    compat.register_inductor_lowering(store, lambda node, operands: compat.store_in_inductor(*operands))
