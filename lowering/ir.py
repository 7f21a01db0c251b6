"""The quantised IR: semantic ops whose implementation is the reference.

``torch.ops.quartet.*`` run on any device as plain PyTorch; that implementation is also their oracle
and their fallback. Specs travel as strings (``str(QuantSpec)``), so a printed graph reads like the
recipe. Every op is functional and a pure function of its arguments.

    signs(seed, site, n)                  [n] float32 ±1
    random_bits(seed, site, rows, cols)   int16 0…511, what a stochastic quantize draws
    fixed_signs(signs, device)            [n] float32, given
    hadamard(x, n, signs, inverse, dtype) [R, C] → [R, ⌈C/n⌉n]
    quantize(x, spec, seed, site)         [R, C] → codes, scales, mask   (C padded to the block, where there are blocks)
    dequantize(codes, scales, spec, dtype)→ [R, padded]
    apply_mask(x, mask)                   [R, C], packed bits [R, C/8]
    scaled_mm(a, a_scales, b, b_scales, a_spec, b_spec, dtype)   [M, K] · [N, K]ᵀ

The codes that a scaled_mm reads are those of a quantize or, where one scale is the whole tensor's, their transpose.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from quartet.kernels import reference
from quartet.kernels.spec import QuantSpec

library = torch.library.Library("quartet", "DEF")
_ANY_STRIDES = (torch.Tag.flexible_layout,)  # Inductor need not realise inputs in a fixed layout

library.define("signs(Tensor seed, int site, int n) -> Tensor", tags=_ANY_STRIDES)
library.define("fixed_signs(int[] signs, Device device) -> Tensor", tags=_ANY_STRIDES)
library.define("random_bits(Tensor seed, int site, SymInt rows, SymInt cols) -> Tensor", tags=_ANY_STRIDES)
library.define("hadamard(Tensor x, int n, Tensor? signs, bool inverse, ScalarType dtype) -> Tensor", tags=_ANY_STRIDES)
library.define("quantize(Tensor x, str spec, Tensor? seed, int site) -> (Tensor, Tensor, Tensor)", tags=_ANY_STRIDES)
library.define("dequantize(Tensor codes, Tensor scales, str spec, ScalarType dtype) -> Tensor", tags=_ANY_STRIDES)
library.define("apply_mask(Tensor x, Tensor mask) -> Tensor", tags=_ANY_STRIDES)
library.define("scaled_mm(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, str a_spec, str b_spec, "
               "ScalarType dtype) -> Tensor", tags=_ANY_STRIDES)


def ceil_to(size, multiple: int):
    """``size`` (int or SymInt) rounded up, without a guard."""
    return (size + multiple - 1) // multiple * multiple


FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def code_layout(spec: QuantSpec, padded: Any) -> tuple[torch.dtype, Any]:
    """dtype and last-axis length of the codes of ``padded`` elements."""
    return (torch.uint8, padded // 2) if spec.element == "e2m1" else (FLOAT8[spec.element], padded)


def scale_layout(spec: QuantSpec, rows: Any, padded: Any) -> tuple[torch.dtype, tuple[Any, Any]]:
    """dtype and shape of the scales of ``[rows, padded]`` elements."""
    if spec.blocked:
        return torch.uint8, (rows, padded // spec.block)
    return torch.float32, (1 if spec.block == "tensor" else rows, 1)


def _signs(seed: Tensor, site: int, n: int) -> Tensor:
    return reference.random_signs(seed, site, n)


def _signs_fake(seed: Tensor, site: int, n: int) -> Tensor:
    return seed.new_empty(n, dtype=torch.float32)


def _random_bits(seed: Tensor, site: int, rows: int, cols: int) -> Tensor:
    return reference.random_bits(seed, site, rows, cols).to(torch.int16)


def _random_bits_fake(seed: Tensor, site: int, rows, cols) -> Tensor:
    return seed.new_empty(rows, cols, dtype=torch.int16)


def _fixed_signs(signs: list[int], device: torch.device) -> Tensor:
    return torch.tensor(signs, dtype=torch.float32, device=device)


def _fixed_signs_fake(signs: list[int], device: torch.device) -> Tensor:
    return torch.empty(len(signs), dtype=torch.float32, device=device)


def _hadamard(x: Tensor, n: int, signs: Tensor | None, inverse: bool, dtype: torch.dtype) -> Tensor:
    return reference.hadamard(x, n, signs, inverse, dtype)


def _hadamard_fake(x: Tensor, n: int, signs: Tensor | None, inverse: bool, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape[0], ceil_to(x.shape[1], n), dtype=dtype)


def _quantize(x: Tensor, spec: str, seed: Tensor | None, site: int) -> tuple[Tensor, Tensor, Tensor]:
    return reference.quantize(x, QuantSpec.parse(spec), seed, site)


def _quantize_fake(x: Tensor, spec: str, seed: Tensor | None, site: int) -> tuple[Tensor, Tensor, Tensor]:
    q = QuantSpec.parse(spec)
    rows, padded = x.shape[0], ceil_to(x.shape[1], q.multiple)
    dtype, width = code_layout(q, padded)
    scale_dtype, scale_shape = scale_layout(q, rows, padded)
    mask = x.new_empty(rows, padded // 8, dtype=torch.uint8) if q.mask else x.new_empty(0, dtype=torch.uint8)
    return x.new_empty(rows, width, dtype=dtype), x.new_empty(scale_shape, dtype=scale_dtype), mask


def _dequantize(codes: Tensor, scales: Tensor, spec: str, dtype: torch.dtype) -> Tensor:
    return reference.dequantize(codes, scales, QuantSpec.parse(spec), dtype).contiguous()


def _dequantize_fake(codes: Tensor, scales: Tensor, spec: str, dtype: torch.dtype) -> Tensor:
    width = codes.shape[1] * (2 if QuantSpec.parse(spec).element == "e2m1" else 1)
    return codes.new_empty(codes.shape[0], width, dtype=dtype)


def _apply_mask(x: Tensor, mask: Tensor) -> Tensor:
    cols = x.shape[1]
    return reference.apply_mask(reference.pad_last(x, 8), mask[:, : (cols + 7) // 8])[:, :cols].contiguous()


def _apply_mask_fake(x: Tensor, mask: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _scaled_mm(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, a_spec: str, b_spec: str,
               dtype: torch.dtype) -> Tensor:
    return reference.scaled_mm(a, a_scales, b, b_scales, QuantSpec.parse(a_spec), QuantSpec.parse(b_spec), dtype)


def _scaled_mm_fake(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, a_spec: str, b_spec: str,
                    dtype: torch.dtype) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


for _name, _impl, _fake in (
    ("signs", _signs, _signs_fake),
    ("random_bits", _random_bits, _random_bits_fake),
    ("fixed_signs", _fixed_signs, _fixed_signs_fake),
    ("hadamard", _hadamard, _hadamard_fake),
    ("quantize", _quantize, _quantize_fake),
    ("dequantize", _dequantize, _dequantize_fake),
    ("apply_mask", _apply_mask, _apply_mask_fake),
    ("scaled_mm", _scaled_mm, _scaled_mm_fake),
):
    library.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"quartet::{_name}", _fake, lib=library)

ops = torch.ops.quartet
SIGNS = ops.signs.default
FIXED_SIGNS = ops.fixed_signs.default
HADAMARD = ops.hadamard.default
QUANTIZE = ops.quantize.default
DEQUANTIZE = ops.dequantize.default
APPLY_MASK = ops.apply_mask.default
SCALED_MM = ops.scaled_mm.default
SEMANTIC = (SIGNS, FIXED_SIGNS, HADAMARD, QUANTIZE, DEQUANTIZE, APPLY_MASK, SCALED_MM)


def quantizer_of(codes: Node) -> tuple[Node, bool]:
    """The node whose first result is an operand of a scaled_mm, and whether the operand is its transpose."""
    flipped = codes.target is torch.ops.aten.permute.default
    item = codes.args[0] if flipped else codes
    assert isinstance(item, Node) and isinstance(item.args[0], Node)
    return item.args[0], flipped
