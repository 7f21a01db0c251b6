"""FP8 and INT8 with a scale a row, from one read of rows that fit into a program's registers, else from two."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from quartet.kernels.spec import QuantSpec, dtype_name
from quartet.kernels.triton.bytes.codes import encode
from quartet.kernels.triton.bytes.scales import magnitude, scales_of
from quartet.kernels.triton.host import DTYPES, cdiv, hardware, on_device, power_of_two
from quartet.kernels.triton.launch import launch

_MOST = 16384  # elements of a program: 32 a thread of 16 warps
_FEWEST = 4096


@triton.jit
def quantize_whole_rows(x, codes, scales, rows, cols, row_stride, SPEC: tl.constexpr, HARDWARE: tl.constexpr,
                        PARTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """M rows in PARTS of N columns; of several a row is read again for its codes, when the cache has most of it."""
    ELEMENT: tl.constexpr = SPEC.element
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    if PARTS == 1:
        tile, at, there = _load(x, row, 0, rows, cols, row_stride, N)
        by, scale = scales_of(tl.max(magnitude(tile), 1), SPEC)
        tl.store(codes + at, encode(tile * by[:, None], ELEMENT, HARDWARE), mask=there)
    else:
        top = tl.zeros((M, N), tl.int32)
        for part in range(PARTS):
            tile, _, _ = _load(x, row, part * N, rows, cols, row_stride, N)
            top = tl.maximum(top, magnitude(tile))
        by, scale = scales_of(tl.max(top, 1), SPEC)
        for part in range(PARTS):
            tile, at, there = _load(x, row, part * N, rows, cols, row_stride, N)
            tl.store(codes + at, encode(tile * by[:, None], ELEMENT, HARDWARE), mask=there)
    tl.store(scales + row, scale, mask=row < rows)


@triton.jit
def _load(x, row, first, rows, cols, row_stride, N: tl.constexpr):
    """fp32 tile of N columns from ``first`` on, where it lies in row-major ``[rows, cols]``, what of it is inside."""
    col = first + tl.arange(0, N)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    tile = tl.load(x + row[:, None] * row_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    return tile, row[:, None] * cols + col[None, :], inside


def quantize(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """``reference.quantize`` of rows, bit for bit but for the sign of a NaN.

    Args:
        x: ``[R, K]`` float32, bfloat16 or float16 on a GPU, K at least 1; copied where rows do not lie in memory.
        spec: what :func:`supports` takes.
    Returns:
        codes ``[R, K]``, float8 or int8, and fp32 scales ``[R, 1]``; row-major.
    Raises:
        ValueError: another quantiser, dtype or shape.
    """
    reason = supports(spec, x.dtype)
    if reason is not None:
        raise ValueError(reason)
    if x.dim() != 2 or not x.shape[1]:
        raise ValueError(f"rows are quantised of a 2-D tensor with at least one column, got {list(x.shape)}")
    x = x if x.stride(1) == 1 else x.contiguous()
    r, k = x.shape
    codes, scales = x.new_empty(r, k, dtype=spec.format.storage), x.new_empty(r, 1, dtype=torch.float32)
    if r:
        n = min(power_of_two(k), _MOST)
        m = max(1, _FEWEST // n)
        with on_device(x):
            launch(quantize_whole_rows, (cdiv(r, m),), (x, codes.view(torch.uint8), scales, r, k, x.stride(0)),
                   SPEC=spec, HARDWARE=hardware(x.device, r, k), PARTS=cdiv(k, n), M=m, N=n,
                   num_warps=min(16, m * n // 1024))
    return codes, scales


@cache
def supports(spec: QuantSpec, dtype: torch.dtype) -> str | None:
    """None where the kernel quantises a tensor of this dtype by ``spec``, else why not."""
    if spec.element not in ("e4m3", "e5m2", "int8") or spec.block != "row" or spec.rule not in ("amax", "amax_pow2"):
        return f"the kernel for rows writes e4m3, e5m2 and int8 with fp32 scales by amax or amax_pow2, not '{spec}'"
    if dtype not in DTYPES:
        return f"the kernel for rows reads float32, bfloat16 and float16, not {dtype_name(dtype)}"
    return None
