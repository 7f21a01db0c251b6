"""The semantic ops as Inductor inlines them: the reference in loops that are quick to compile and to run.

- Blocks are kept as ``[block, rows, blocks]``, so that the butterfly, the sums of a block and the packing are
  loops over whole contiguous rows, each element of a block at a constant offset.
- ``quartet::store`` marks what is computed once and kept in memory. Between two marks Inductor fuses freely.

The order of all floating point operations is that of the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quartet.kernels import reference
from quartet.kernels.spec import QuantSpec
from quartet.lowering.ir.layout import ceil_to
from quartet.lowering.ir.op import op

Three = tuple[Tensor, Tensor, Tensor]
RADICES = {16: (4, 4), 32: (8, 4), 64: (8, 8), 128: (8, 4, 4)}


@op(fake=lambda x: x.new_empty(x.shape), strides="any")
def store(x: Tensor) -> Tensor:
    """``x``, kept in memory."""
    return x.clone(memory_format=torch.contiguous_format)


STORE = store.overload


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


def quantize(x: Tensor, spec: str, seed: Tensor | None, site: int, amax: Tensor | None = None) -> Three:
    """The reference with its random bits from an op of their own: Philox inlined would be computed 16 times over.

    On a GPU blocks are not kept where codes are not packed, which halves the time of MXFP8 and of FP8 in blocks. Codes
    are always kept: their readers want them row by row.
    """
    q = QuantSpec.parse(spec)
    whole = x.is_cuda and not q.packed and not q.mask
    bits = None
    if seed is not None:
        shape = reference.random_shape(q, x.shape[0], ceil_to(x.shape[1], q.multiple))
        bits = torch.ops.quartet.random_bits.default(seed, site, *shape)
    codes, scales, mask = reference.quantize(x, q, seed, site, bits, _store_scales if whole else _store_blocks, amax)
    return store(codes), scales, store(mask) if q.mask else mask


def _fields(packed: Tensor, width: int) -> Tensor:
    """Every byte as its 8/width fields, lowest first, along the last axis: one expression, where a stack is many."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & ((1 << width) - 1)).flatten(-2)


def _nibbles(packed: Tensor) -> Tensor:
    return _fields(packed, 4)


def dequantize(codes: Tensor, scales: Tensor, spec: str, dtype: torch.dtype, amax: Tensor | None = None) -> Tensor:
    return reference.dequantize(codes, scales, QuantSpec.parse(spec), dtype, _nibbles, amax)


def apply_mask(x: Tensor, mask: Tensor) -> Tensor:
    cols = x.shape[1]
    return reference.apply_mask(x, mask, lambda packed: _fields(packed, 1)[:, :cols] != 0)


def scaled_mm(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, a_spec: str, b_spec: str,
               dtype: torch.dtype, a_amax: Tensor | None = None, b_amax: Tensor | None = None) -> Tensor:
    specs = QuantSpec.parse(a_spec), QuantSpec.parse(b_spec)
    return reference.scaled_mm(a, a_scales, b, b_scales, *specs, dtype, _nibbles, a_amax, b_amax)


def scaled_bmm(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, a_spec: str, b_spec: str,
                dtype: torch.dtype, batch: Any, a_amax: Tensor | None = None, b_amax: Tensor | None = None) -> Tensor:
    specs = QuantSpec.parse(a_spec), QuantSpec.parse(b_spec)
    return reference.scaled_bmm(a, a_scales, b, b_scales, *specs, dtype, batch, _nibbles, a_amax, b_amax)
