"""Declarations and implementations of the semantic ops, which are described in :mod:`quartet.lowering.ir`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quartet.kernels import reference
from quartet.kernels.spec import QuantSpec

Three = tuple[Tensor, Tensor, Tensor]

library = torch.library.Library("quartet", "DEF")
_ANY_STRIDES = (torch.Tag.flexible_layout,)  # Inductor need not realise inputs in a fixed layout

library.define("signs(Tensor seed, int site, int n) -> Tensor", tags=_ANY_STRIDES)
library.define("fixed_signs(int[] signs, Device device) -> Tensor", tags=_ANY_STRIDES)
library.define("random_bits(Tensor seed, int site, SymInt rows, SymInt cols) -> Tensor", tags=_ANY_STRIDES)
library.define("hadamard(Tensor x, int n, Tensor? signs, bool inverse, ScalarType dtype) -> Tensor", tags=_ANY_STRIDES)
library.define("amax(Tensor x) -> Tensor", tags=_ANY_STRIDES)
library.define("quantize(Tensor x, str spec, Tensor? seed, int site, Tensor? amax=None) -> (Tensor, Tensor, Tensor)",
               tags=_ANY_STRIDES)
library.define("dequantize(Tensor codes, Tensor scales, str spec, ScalarType dtype, Tensor? amax=None) -> Tensor",
               tags=_ANY_STRIDES)
library.define("apply_mask(Tensor x, Tensor mask) -> Tensor", tags=_ANY_STRIDES)
library.define("scaled_mm(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, str a_spec, str b_spec, "
               "ScalarType dtype, Tensor? a_amax=None, Tensor? b_amax=None) -> Tensor", tags=_ANY_STRIDES)
library.define("scaled_bmm(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, str a_spec, str b_spec, "
               "ScalarType dtype, SymInt batch, Tensor? a_amax=None, Tensor? b_amax=None) -> Tensor", tags=_ANY_STRIDES)


def ceil_to(size, multiple: int):
    """``size`` (int or SymInt) rounded up, without a guard."""
    return (size + multiple - 1) // multiple * multiple


FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_BITS = 32  # signs of a word
_SCALES = {"e8m0": torch.uint8, "e4m3": torch.float8_e4m3fn, "fp32": torch.float32}


def code_layout(spec: QuantSpec, padded: Any) -> tuple[torch.dtype, Any]:
    """dtype and last-axis length of the codes of ``padded`` elements."""
    return (spec.format.storage, padded // 2 if spec.packed else padded)


def scale_layout(spec: QuantSpec, rows: Any, padded: Any) -> tuple[torch.dtype, tuple[Any, Any]]:
    """dtype and shape of the scales of ``[rows, padded]`` elements."""
    dtype = _SCALES[spec.scale]
    if spec.blocked:
        return dtype, (ceil_to(rows, spec.block) // spec.block if spec.tile else rows, padded // spec.block)
    return dtype, (1 if spec.block == "tensor" else rows, 1)


def _signs(seed: Tensor, site: int, n: int) -> Tensor:
    return reference.random_signs(seed, site, n)


def _signs_fake(seed: Tensor, site: int, n: int) -> Tensor:
    return seed.new_empty(n, dtype=torch.float32)


def _random_bits(seed: Tensor, site: int, rows: int, cols: int) -> Tensor:
    return reference.random_bits(seed, site, rows, cols).to(torch.int16)


def _random_bits_fake(seed: Tensor, site: int, rows, cols) -> Tensor:
    return seed.new_empty(rows, cols, dtype=torch.int16)


def fixed_signs(signs: Sequence[int], device: torch.device) -> Tensor:
    """Made on the device: a copy from the host would wait for it, and cannot be recorded in a CUDA graph."""
    found = []
    for start in range(0, len(signs), _BITS):
        part = signs[start:start + _BITS]
        word = sum(1 << i for i, sign in enumerate(part) if sign < 0)
        at = torch.arange(len(part), device=device)
        found.append(1 - 2 * (torch.full_like(at, word) >> at & 1))
    return torch.cat(found).to(torch.float32)


def _fixed_signs_fake(signs: list[int], device: torch.device) -> Tensor:
    return torch.empty(len(signs), dtype=torch.float32, device=device)


def _hadamard(x: Tensor, n: int, signs: Tensor | None, inverse: bool, dtype: torch.dtype) -> Tensor:
    return reference.hadamard(x, n, signs, inverse, dtype)


def _hadamard_fake(x: Tensor, n: int, signs: Tensor | None, inverse: bool, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape[0], ceil_to(x.shape[1], n), dtype=dtype)


def _amax(x: Tensor) -> Tensor:
    return reference.largest_magnitude(x)


def _amax_fake(x: Tensor) -> Tensor:
    return x.new_empty(1, 1, dtype=torch.float32)


def _quantize(x: Tensor, spec: str, seed: Tensor | None, site: int, amax: Tensor | None = None) -> Three:
    codes, scales, mask = reference.quantize(x, QuantSpec.parse(spec), seed, site, amax=amax)
    return codes.contiguous(), scales.contiguous(), mask.contiguous()


def _quantize_fake(x: Tensor, spec: str, seed: Tensor | None, site: int, amax: Tensor | None = None) -> Three:
    q = QuantSpec.parse(spec)
    rows, padded = x.shape[0], ceil_to(x.shape[1], q.multiple)
    dtype, width = code_layout(q, padded)
    scale_dtype, scale_shape = scale_layout(q, rows, padded)
    mask = x.new_empty(rows, padded // 8, dtype=torch.uint8) if q.mask else x.new_empty(0, dtype=torch.uint8)
    return x.new_empty(rows, width, dtype=dtype), x.new_empty(scale_shape, dtype=scale_dtype), mask


def _dequantize(codes: Tensor, scales: Tensor, spec: str, dtype: torch.dtype, amax: Tensor | None = None) -> Tensor:
    return reference.dequantize(codes, scales, QuantSpec.parse(spec), dtype, amax=amax).contiguous()


def _dequantize_fake(codes: Tensor, scales: Tensor, spec: str, dtype: torch.dtype,
                     amax: Tensor | None = None) -> Tensor:
    width = codes.shape[1] * (2 if QuantSpec.parse(spec).packed else 1)
    return codes.new_empty(codes.shape[0], width, dtype=dtype)


def _apply_mask(x: Tensor, mask: Tensor) -> Tensor:
    cols = x.shape[1]
    return reference.apply_mask(reference.pad_last(x, 8), mask[:, : (cols + 7) // 8])[:, :cols].contiguous()


def _apply_mask_fake(x: Tensor, mask: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _scaled_mm(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, a_spec: str, b_spec: str,
               dtype: torch.dtype, a_amax: Tensor | None = None, b_amax: Tensor | None = None) -> Tensor:
    return reference.scaled_mm(a, a_scales, b, b_scales, QuantSpec.parse(a_spec), QuantSpec.parse(b_spec), dtype,
                               a_amax=a_amax, b_amax=b_amax)


def _scaled_mm_fake(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, a_spec: str, b_spec: str,
                    dtype: torch.dtype, a_amax: Tensor | None = None, b_amax: Tensor | None = None) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


def _scaled_bmm(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, a_spec: str, b_spec: str,
                dtype: torch.dtype, batch: int, a_amax: Tensor | None = None, b_amax: Tensor | None = None) -> Tensor:
    return reference.scaled_bmm(a, a_scales, b, b_scales, QuantSpec.parse(a_spec), QuantSpec.parse(b_spec), dtype,
                                batch, a_amax=a_amax, b_amax=b_amax)


def _scaled_bmm_fake(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, a_spec: str, b_spec: str,
                     dtype: torch.dtype, batch, a_amax: Tensor | None = None, b_amax: Tensor | None = None) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0] // batch, dtype=dtype)


for _name, _impl, _fake in (
    ("signs", _signs, _signs_fake),
    ("random_bits", _random_bits, _random_bits_fake),
    ("fixed_signs", fixed_signs, _fixed_signs_fake),
    ("hadamard", _hadamard, _hadamard_fake),
    ("amax", _amax, _amax_fake),
    ("quantize", _quantize, _quantize_fake),
    ("dequantize", _dequantize, _dequantize_fake),
    ("apply_mask", _apply_mask, _apply_mask_fake),
    ("scaled_mm", _scaled_mm, _scaled_mm_fake),
    ("scaled_bmm", _scaled_bmm, _scaled_bmm_fake),
):
    library.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"quartet::{_name}", _fake, lib=library)

ops = torch.ops.quartet
SIGNS = ops.signs.default
FIXED_SIGNS = ops.fixed_signs.default
HADAMARD = ops.hadamard.default
AMAX = ops.amax.default
QUANTIZE = ops.quantize.default
DEQUANTIZE = ops.dequantize.default
APPLY_MASK = ops.apply_mask.default
SCALED_MM = ops.scaled_mm.default
SCALED_BMM = ops.scaled_bmm.default
PRODUCTS = (SCALED_MM, SCALED_BMM)
SEMANTIC = (SIGNS, FIXED_SIGNS, HADAMARD, AMAX, QUANTIZE, DEQUANTIZE, APPLY_MASK, *PRODUCTS)
