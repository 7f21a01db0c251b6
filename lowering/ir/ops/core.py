"""The semantic ops, which are described in :mod:`quartet.lowering.ir`, each declared on its reference."""

from __future__ import annotations

import torch
from torch import Tensor

from quartet.kernels import reference
from quartet.kernels.spec import QuantSpec
from quartet.lowering.ir.layout import ceil_to, code_layout, scale_layout
from quartet.lowering.ir.op import Size, op
from quartet.lowering.ir.ops import decompositions
from quartet.lowering.ir.ops.decompositions import Three

_BITS = 32  # signs of a word


@op(fake=lambda seed, site, n: seed.new_empty(n, dtype=torch.float32), strides="any", mergeable=True)
def signs(seed: Tensor, site: int, n: int) -> Tensor:
    return reference.random_signs(seed, site, n)


@op(fake=lambda seed, first, count, n: seed.new_empty(count, n, dtype=torch.float32), strides="any", mergeable=True)
def sign_table(seed: Tensor, first: int, count: int, n: int) -> Tensor:
    return reference.sign_table(seed, first, count, n)


@op(fake=lambda seed, site, rows, cols: seed.new_empty(rows, cols, dtype=torch.int16), strides="any")
def random_bits(seed: Tensor, site: int, rows: Size, cols: Size) -> Tensor:
    return reference.random_bits(seed, site, rows, cols).to(torch.int16)


@op(fake=lambda signs, device: torch.empty(len(signs), dtype=torch.float32, device=device), decompose=True,
    strides="any", mergeable=True)
def fixed_signs(signs: list[int], device: torch.device) -> Tensor:
    """Made on the device: a copy from the host would wait for it, and cannot be recorded in a CUDA graph."""
    found = []
    for start in range(0, len(signs), _BITS):
        part = signs[start:start + _BITS]
        word = sum(1 << i for i, sign in enumerate(part) if sign < 0)
        at = torch.arange(len(part), device=device)
        found.append(1 - 2 * (torch.full_like(at, word) >> at & 1))
    return torch.cat(found).to(torch.float32)


def _hadamard_fake(x, n, signs, inverse, dtype):
    return x.new_empty(x.shape[0], ceil_to(x.shape[1], n), dtype=dtype)


@op(fake=_hadamard_fake, decompose=decompositions.hadamard, strides="any", mergeable=True)
def hadamard(x: Tensor, n: int, signs: Tensor | None, inverse: bool, dtype: torch.dtype) -> Tensor:
    return reference.hadamard(x, n, signs, inverse, dtype)


@op(fake=lambda x: x.new_empty(1, 1, dtype=torch.float32), decompose=True, strides="any", mergeable=True)
def amax(x: Tensor) -> Tensor:
    return reference.largest_magnitude(x)


def _quantize_fake(x, spec, seed, site, amax=None):
    q = QuantSpec.parse(spec)
    rows, padded = x.shape[0], ceil_to(x.shape[1], q.multiple)
    dtype, width = code_layout(q, padded)
    scale_dtype, scale_shape = scale_layout(q, rows, padded)
    mask = x.new_empty(rows, padded // 8, dtype=torch.uint8) if q.mask else x.new_empty(0, dtype=torch.uint8)
    return x.new_empty(rows, width, dtype=dtype), x.new_empty(scale_shape, dtype=scale_dtype), mask


@op(fake=_quantize_fake, decompose=decompositions.quantize, strides="any", mergeable=True)
def quantize(x: Tensor, spec: str, seed: Tensor | None, site: int, amax: Tensor | None = None) -> Three:
    codes, scales, mask = reference.quantize(x, QuantSpec.parse(spec), seed, site, amax=amax)
    return codes.contiguous(), scales.contiguous(), mask.contiguous()


def _dequantize_fake(codes, scales, spec, dtype, amax=None):
    return codes.new_empty(codes.shape[0], codes.shape[1] * (2 if QuantSpec.parse(spec).packed else 1), dtype=dtype)


@op(fake=_dequantize_fake, decompose=decompositions.dequantize, strides="any", mergeable=True)
def dequantize(codes: Tensor, scales: Tensor, spec: str, dtype: torch.dtype, amax: Tensor | None = None) -> Tensor:
    return reference.dequantize(codes, scales, QuantSpec.parse(spec), dtype, amax=amax).contiguous()


def _apply_mask_fake(x, mask):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@op(fake=_apply_mask_fake, decompose=decompositions.apply_mask, strides="any", mergeable=True)
def apply_mask(x: Tensor, mask: Tensor) -> Tensor:
    cols = x.shape[1]
    return reference.apply_mask(reference.pad_last(x, 8), mask[:, : (cols + 7) // 8])[:, :cols].contiguous()


def _scaled_mm_fake(a, a_scales, b, b_scales, a_spec, b_spec, dtype, a_amax=None, b_amax=None):
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


@op(fake=_scaled_mm_fake, decompose=decompositions.scaled_mm, strides="any", mergeable=True)
def scaled_mm(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, a_spec: str, b_spec: str,
              dtype: torch.dtype, a_amax: Tensor | None = None, b_amax: Tensor | None = None) -> Tensor:
    return reference.scaled_mm(a, a_scales, b, b_scales, QuantSpec.parse(a_spec), QuantSpec.parse(b_spec), dtype,
                               a_amax=a_amax, b_amax=b_amax)


def _scaled_bmm_fake(a, a_scales, b, b_scales, a_spec, b_spec, dtype, batch, a_amax=None, b_amax=None):
    return a.new_empty(a.shape[0], b.shape[0] // batch, dtype=dtype)


@op(fake=_scaled_bmm_fake, decompose=decompositions.scaled_bmm, strides="any", mergeable=True)
def scaled_bmm(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, a_spec: str, b_spec: str,
               dtype: torch.dtype, batch: Size, a_amax: Tensor | None = None, b_amax: Tensor | None = None) -> Tensor:
    return reference.scaled_bmm(a, a_scales, b, b_scales, QuantSpec.parse(a_spec), QuantSpec.parse(b_spec), dtype,
                                batch, a_amax=a_amax, b_amax=b_amax)


SIGNS, SIGN_TABLE, FIXED_SIGNS = signs.overload, sign_table.overload, fixed_signs.overload
HADAMARD, AMAX = hadamard.overload, amax.overload
QUANTIZE, DEQUANTIZE, APPLY_MASK = quantize.overload, dequantize.overload, apply_mask.overload
SCALED_MM, SCALED_BMM = scaled_mm.overload, scaled_bmm.overload
PRODUCTS = (SCALED_MM, SCALED_BMM)
