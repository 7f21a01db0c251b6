"""Graph ops over block-scaled matrix products, and the layouts of scales that they take.

    swizzle_scales     scales row by row → the layout of Blackwell's tensor cores
    block_scaled_mm    gain · alpha · A · Bᵀ by a kernel generated with CUTLASS
    library_scaled_mm  alpha · A · Bᵀ by cuBLASLt, through ``torch.nn.functional.scaled_mm``

Codes are row-major, ``[M, …]`` and ``[N, …]``: uint8 with two E2M1 to a byte, or float8. Formats, and their scales:

    mxf4, nvf4, mxf8   E2M1/32 E8M0, E2M1/16 E4M3, E4M3/32 E8M0: uint8 ``[swizzled_size(R, K/block)]``
    1x128              FP8 in blocks of 128: fp32 ``[K/128, R]``
    128x128            FP8 in tiles: fp32 ``[⌈R/128⌉, K/128 rounded up to 4]``

``alpha`` is fp32 with one element, the factor of both tensors; None is 1. On a CPU both products are those of the
dequantised operands in fp32.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from quartet.kernels import reference
from quartet.kernels.reference.packing import unpack_nibbles
from quartet.kernels.reference.quantize import inner
from quartet.kernels.spec import QuantSpec
from quartet.lowering.ir import ceil_to, library

SPECS = {
    "mxf4": QuantSpec(),
    "nvf4": QuantSpec.parse("e2m1/16 e4m3 amax nearest"),
    "mxf8": QuantSpec("e4m3"),
    "1x128": QuantSpec.parse("e4m3/128 fp32 amax nearest"),
    "128x128": QuantSpec.parse("e4m3/128x128 fp32 amax nearest"),
}
STRIP = 4  # what cuBLASLt wants the rows of 1x128 and the columns of 128x128 scales to be a multiple of

_EXACT = (torch.Tag.needs_exact_strides,)
_OPERANDS = "Tensor a, Tensor a_scales, Tensor b, Tensor b_scales"
library.define("swizzle_scales(Tensor scales, int tile) -> Tensor", tags=(torch.Tag.flexible_layout,))
library.define(f"block_scaled_mm({_OPERANDS}, str kind, float gain, ScalarType dtype, Tensor? alpha=None) -> Tensor",
               tags=_EXACT)
library.define(f"library_scaled_mm({_OPERANDS}, str a_format, str b_format, ScalarType dtype, Tensor? alpha=None) "
               "-> Tensor", tags=_EXACT)


def swizzle(scales: Tensor, tile: int) -> Tensor:
    """``[R, C]`` one-byte scales, each of ``tile`` rows, in the order of ``reference.swizzle_scales``: uint8."""
    scales = scales.view(torch.uint8)
    return reference.swizzle_scales(scales.repeat_interleave(tile, 0) if tile > 1 else scales)


def _swizzle_fake(scales, tile):
    rows, cols = scales.shape
    return scales.new_empty(ceil_to(rows * tile, 128) * ceil_to(cols, 4), dtype=torch.uint8)


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


def _cutlass_cpu(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, kind: str, gain: float, dtype: torch.dtype,
                 alpha: Tensor | None = None) -> Tensor:
    return (_product(a, a_scales, b, b_scales, kind, kind, torch.float32, alpha) * gain).to(dtype)


def _cutlass(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, kind: str, gain: float, dtype: torch.dtype,
             alpha: Tensor | None = None) -> Tensor:
    from quartet.kernels.cutlass.gemm import gemm

    if alpha is None:
        alpha = _scalar(gain, a.device) if gain != 1.0 else None
    elif gain != 1.0:
        alpha = alpha * gain
    return gemm(a, a_scales, b, b_scales, alpha, kind=kind, dtype=dtype)


@cache
def _scalar(value: float, device: torch.device) -> Tensor:
    """fp32 on the device."""
    from quartet.kernels.triton.fold import lasting

    return lasting(device, lambda: torch.full((), value, dtype=torch.float32, device=device))


def _library(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, a_format: str, b_format: str,
             dtype: torch.dtype, alpha: Tensor | None = None) -> Tensor:
    rows = a.shape[0]
    if a_format == "1x128" and rows % STRIP:
        a, a_scales = F.pad(a.view(torch.uint8), (0, 0, 0, -rows % STRIP)).view(a.dtype), F.pad(a_scales, (0, -rows % STRIP))
    left, right = library_arguments(a, a_scales, a_format, alpha), library_arguments(b, b_scales, b_format, None)
    if a_format == "nvf4":
        one = _scalar(1.0, a.device)
        left[1][1:], right[1][1:] = [one if alpha is None else alpha.reshape(())], [one]
    out = F.scaled_mm(left[0], right[0].t(), left[1], left[2], right[1], right[2], left[3], right[3],
                      output_dtype=dtype)
    return out[:rows]


def _product_fake(a, a_scales, b, b_scales, *rest):
    dtype = next(value for value in rest if isinstance(value, torch.dtype))
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)
