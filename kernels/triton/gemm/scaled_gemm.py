"""The block-scaled FP4 product in Triton: for GPUs with FP4 tensor cores where no CUTLASS kernel can be built."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quartet.kernels.reference.formats.packing import swizzled_size
from quartet.kernels.spec import dtype_name
from quartet.kernels.triton.host import DTYPES, cdiv, on_device
from quartet.kernels.triton.launch import launch
from quartet.kernels.triton.memory import swizzled

TILE = (128, 128, 128)
GROUP = 8  # rows of tiles that share what the L2 cache holds of B


@triton.jit
def _codes(pointer, row, rows, first, half, BK: tl.constexpr):
    """``[rows, BK/2]`` bytes of packed codes from byte ``first`` of each row on, 0 outside."""
    byte = first + tl.arange(0, BK // 2)
    inside = (row < rows)[:, None] & (byte < half)[None, :]
    return tl.load(pointer + row[:, None].to(tl.int64) * half + byte[None, :], mask=inside, other=0)


@triton.jit
def _scales(pointer, row, rows, first, columns, BK: tl.constexpr):
    """``[rows, BK/32]`` scale bytes from block ``first`` of each row on, 2^-127 outside."""
    column = first + tl.arange(0, BK // 32)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(pointer + swizzled(row[:, None], column[None, :], columns), mask=inside, other=0)


@triton.jit
def mxfp4_gemm(a, a_scales, b, b_scales, d, gain, m, n, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
               GROUPED: tl.constexpr):
    """``D = gain · A · Bᵀ`` of E2M1 codes in blocks of 32 with swizzled E8M0 scales, accumulated in fp32."""
    tiles_m, tiles_n = tl.cdiv(m, BM), tl.cdiv(n, BN)
    wide = GROUPED * tiles_n
    group = tl.program_id(0) // wide
    height = tl.minimum(tiles_m - group * GROUPED, GROUPED)
    row = (group * GROUPED + tl.program_id(0) % wide % height) * BM + tl.arange(0, BM)
    column = tl.program_id(0) % wide // height * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    half, blocks = k // 2, k // 32
    for step in range(0, tl.cdiv(k, BK)):
        left = _codes(a, row, m, step * (BK // 2), half, BK)
        right = _codes(b, column, n, step * (BK // 2), half, BK)
        left_scales = _scales(a_scales, row, m, step * (BK // 32), blocks, BK)
        right_scales = _scales(b_scales, column, n, step * (BK // 32), blocks, BK)
        total = tl.dot_scaled(left, left_scales, "e2m1", tl.trans(right), right_scales, "e2m1", total)
    inside = (row < m)[:, None] & (column < n)[None, :]
    tl.store(d + row[:, None].to(tl.int64) * n + column[None, :], (total * gain).to(d.dtype.element_ty), mask=inside)


def gemm(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, gain: float, dtype: torch.dtype) -> Tensor:
    """``gain · A · Bᵀ`` of packed MXFP4 operands: ``[M, N]`` of ``dtype``.

    Args:
        a, b: uint8 ``[M, K/2]`` and ``[N, K/2]``, contiguous, K a multiple of 32.
        a_scales, b_scales: uint8, ``swizzled_size(M, K/32)`` and ``swizzled_size(N, K/32)`` bytes.
    Raises:
        ValueError: operands that do not fit together, or another dtype.
    """
    (m, half), n = a.shape, b.shape[0]
    wanted = swizzled_size(m, half // 16), swizzled_size(n, half // 16)
    if b.shape[1] != half or half % 16 or dtype not in DTYPES or (a_scales.numel(), b_scales.numel()) != wanted:
        raise ValueError(f"a block-scaled product takes codes of equal rows, K a multiple of 32, and their swizzled "
                         f"scales, got a {list(a.shape)} with {a_scales.numel()} of {wanted[0]} scales, b "
                         f"{list(b.shape)} with {b_scales.numel()} of {wanted[1]}, into {dtype_name(dtype)}")
    d = a.new_empty(m, n, dtype=dtype)
    bm, bn, bk = TILE
    if d.numel():
        with on_device(a):
            launch(mxfp4_gemm, (cdiv(m, bm) * cdiv(n, bn),),
                (a, a_scales, b, b_scales, d, gain, m, n, half * 2),
                BM=bm, BN=bn, BK=bk, GROUPED=GROUP, num_warps=8, num_stages=3)
    return d
