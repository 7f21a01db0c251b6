"""Graph ops over block-scaled matrix products, and the layouts of scales that they take.

    swizzle_scales     scales row by row → the layout of Blackwell's tensor cores
    block_scaled_mm    gain · alpha · A · Bᵀ by a kernel generated with CUTLASS
    library_scaled_mm  alpha · A · Bᵀ by cuBLASLt, through ``torch.nn.functional.scaled_mm``

Codes are row-major, ``[M, …]`` and ``[N, …]``: uint8 with two E2M1 to a byte, or float8. Formats, and their scales:

    mxf4, nvf4, mxf8   E2M1/32 E8M0, E2M1/16 E4M3, E4M3/32 E8M0: uint8 ``[swizzled_size(R, K/block)]``
    1x128              FP8 in blocks of 128: fp32 ``[K/128, R]``
    128x128            FP8 in tiles: fp32 ``[⌈R/128⌉, K/128 rounded up to 4]``

``alpha`` is fp32 with one element, the factor of both tensors; None is 1. ``tune`` lets the first call of a shape class
measure which kernel is fastest. On a CPU both products is that of the dequantised operands in fp32.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quartet.kernels import reference
from quartet.kernels.reference.formats.packing import unpack_nibbles
from quartet.kernels.reference.quantize import inner
from quartet.kernels.spec import QuantSpec
from quartet.lowering.ir import ceil_to
from quartet.lowering.ir.op import op

SPECS = {
    "mxf4": QuantSpec(),
    "nvf4": QuantSpec.parse("e2m1/16 e4m3 amax nearest"),
    "mxf8": QuantSpec("e4m3"),
    "1x128": QuantSpec.parse("e4m3/128 fp32 amax nearest"),
    "128x128": QuantSpec.parse("e4m3/128x128 fp32 amax nearest"),
}
STRIP = 4  # what cuBLASLt wants the rows of 1x128 and the columns of 128x128 scales to be a multiple of

_SCALING = F.ScalingType
_LIBRARY = {  # ScalingType, and what scaled_mm calls the dtypes of codes and scales
    "nvf4": (_SCALING.BlockWise1x16, torch.float4_e2m1fn_x2, torch.float8_e4m3fn),
    "mxf8": (_SCALING.BlockWise1x32, torch.float8_e4m3fn, torch.float8_e8m0fnu),
    "1x128": (_SCALING.BlockWise1x128, None, torch.float32),
    "128x128": (_SCALING.BlockWise128x128, None, torch.float32),
}


def _swizzle_fake(scales, tile):
    rows, cols = scales.shape
    return scales.new_empty(ceil_to(rows * tile, 128) * ceil_to(cols, 4), dtype=torch.uint8)


@op(fake=_swizzle_fake, decompose=True, strides="any")
def swizzle_scales(scales: Tensor, tile: int) -> Tensor:
    """``[R, C]`` one-byte scales, each of ``tile`` rows, in the order of ``reference.swizzle_scales``: uint8."""
    scales = scales.view(torch.uint8)
    return reference.swizzle_scales(scales.repeat_interleave(tile, 0) if tile > 1 else scales)


def values(codes: Tensor, scales: Tensor, format: str) -> Tensor:
    """fp32 ``[R, K]`` of an operand, without the factor of its tensor."""
    spec, rows = SPECS[format], codes.shape[0]
    cols = codes.shape[1] * (2 if spec.element == "e2m1" else 1)
    if spec.scale == "fp32":
        scales = scales[:, : cols // spec.block] if spec.tile else scales.t()
    else:
        scales = reference.unswizzle_scales(scales, rows, cols // spec.block)
        scales = scales.view(torch.float8_e4m3fn) if spec.scale == "e4m3" else scales
    codes = codes.view(torch.float8_e4m3fn) if codes.dtype is torch.uint8 and spec.element == "e4m3" else codes
    return inner(codes, scales, spec, torch.float32, unpack_nibbles)


def _product(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, a_format: str, b_format: str,
             dtype: torch.dtype, alpha: Tensor | None = None) -> Tensor:
    product = values(a, a_scales, a_format) @ values(b, b_scales, b_format).t()
    return (product if alpha is None else product * alpha.reshape(())).to(dtype)


def _cutlass_fake(a, a_scales, b, b_scales, kind, gain, dtype, alpha=None, tune=False):
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


@op(fake=_cutlass_fake, strides="exact")
def block_scaled_mm(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, kind: str, gain: float,
                    dtype: torch.dtype, alpha: Tensor | None = None, tune: bool = False) -> Tensor:
    return (_product(a, a_scales, b, b_scales, kind, kind, torch.float32, alpha) * gain).to(dtype)


@block_scaled_mm.provider("cutlass", "cuda")
def _cutlass(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, kind: str, gain: float, dtype: torch.dtype,
             alpha: Tensor | None = None, tune: bool = False) -> Tensor:
    from quartet.kernels.cutlass.gemm import gemm
    from quartet.kernels.cutlass.tune import tune_once

    if alpha is None:
        alpha = _scalar(gain, a.device) if gain != 1.0 else None
    elif gain != 1.0:
        alpha = alpha * gain
    if tune:
        tune_once(a, a_scales, b, b_scales, alpha, kind=kind, dtype=dtype)
    return gemm(a, a_scales, b, b_scales, alpha, kind=kind, dtype=dtype)


@cache
def _scalar(value: float, device: torch.device) -> Tensor:
    """fp32 on the device."""
    from quartet.kernels.triton.quantize.fold import lasting

    return lasting(device, lambda: torch.full((), value, dtype=torch.float32, device=device))


def library_call(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, a_format: str, b_format: str,
                 dtype: torch.dtype, factors: tuple[Tensor, Tensor] | None) -> dict[str, Any]:
    """The arguments of ``torch.nn.functional.scaled_mm`` for a product, no value of which is read.

    ``factors``: fp32 of A and of B, each with one element; given with ``nvf4``.
    """
    sides: dict[str, Any] = {}
    for name, codes, scales, format in (("a", a, a_scales, a_format), ("b", b, b_scales, b_format)):
        recipe, codes_dtype, scale_dtype = _LIBRARY[format]
        codes = codes if codes_dtype is None else codes.view(codes_dtype)
        swizzled = scale_dtype is not torch.float32
        scale = [scales.view(scale_dtype) if swizzled else scales.t()]
        recipes, swizzles = [recipe], [F.SwizzleType.SWIZZLE_32_4_4 if swizzled else F.SwizzleType.NO_SWIZZLE]
        if factors is not None:
            scale.append(factors[name == "b"].reshape(()))
            recipes.append(F.ScalingType.TensorWise)
            swizzles.append(F.SwizzleType.NO_SWIZZLE)
        sides |= {f"mat_{name}": codes if name == "a" else codes.t(), f"scale_{name}": scale,
                  f"scale_recipe_{name}": recipes, f"swizzle_{name}": swizzles}
    return {**sides, "output_dtype": dtype}


def _library_fake(a, a_scales, b, b_scales, a_format, b_format, dtype, alpha=None):
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


@op(fake=_library_fake, strides="exact")
def library_scaled_mm(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, a_format: str, b_format: str,
                      dtype: torch.dtype, alpha: Tensor | None = None) -> Tensor:
    return _product(a, a_scales, b, b_scales, a_format, b_format, dtype, alpha)


@library_scaled_mm.provider("cublaslt", "cuda")
def _library(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, a_format: str, b_format: str,
             dtype: torch.dtype, alpha: Tensor | None = None) -> Tensor:
    rows = a.shape[0]
    a_scales, b_scales = a_scales.contiguous(), b_scales.contiguous()  # Inductor of 2.11 hands over other strides
    missing = -rows % STRIP if a_format == "1x128" else 0
    if missing:
        a = F.pad(a.view(torch.uint8), (0, 0, 0, missing)).view(a.dtype)
        a_scales = F.pad(a_scales, (0, missing))
    one = _scalar(1.0, a.device) if a_format == "nvf4" else None
    factors = None if one is None else (one if alpha is None else alpha, one)
    out = F.scaled_mm(**library_call(a, a_scales, b, b_scales, a_format, b_format, dtype, factors))
    return out[:rows]


SWIZZLE, MM, LIBRARY_MM = swizzle_scales.overload, block_scaled_mm.overload, library_scaled_mm.overload
