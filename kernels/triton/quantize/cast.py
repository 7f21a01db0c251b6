"""Triton kernels for one-byte operands with one scale: cast of a tensor and of its transpose, and transposition."""

from __future__ import annotations

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from quartet.kernels.triton.bytes import tensors
from quartet.kernels.triton.host import DTYPES, cdiv, on_device
from quartet.kernels.triton.launch import launch
from quartet.kernels.triton.memory import tile_in_stack

_TYPES = {torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e5m2: tl.float8e5}


@triton.jit
def _cast_tile(x, index, multiplier, codes, transposed, rows, cols, row_stride, TYPE: tl.constexpr,
               PLAIN: tl.constexpr, TRANSPOSED: tl.constexpr, COLUMNS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Row i is ``index[i]`` of x, zeros where that is negative, unless there is no index."""
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    col = tl.program_id(1) * N + tl.arange(0, N)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    if index is None:
        read, there = row, inside
    else:
        read = tl.load(index + row, mask=row < rows, other=-1).to(tl.int64)
        there = (read >= 0)[:, None] & (col < cols)[None, :]
    if COLUMNS:
        by = tl.load(multiplier + col, mask=col < cols, other=0.0)[None, :]
    else:
        by = tl.load(multiplier)
    tile = tl.load(x + read[:, None] * row_stride + col[None, :], mask=there, other=0.0).to(tl.float32)
    scaled = tl.where(tl.abs(tile) < float("inf"), tile * by, float("nan"))  # the conversion saturates infinities
    made = scaled.to(TYPE).to(tl.uint8, bitcast=True)
    if PLAIN:
        tl.store(codes + row[:, None] * cols + col[None, :], made, mask=inside)
    if TRANSPOSED:
        _store_turned(transposed, made, row, col, rows, inside)


@triton.jit
def _cast_turned_tile(x, multiplier, out, rows, cols, matrix_stride, row_stride, TYPE: tl.constexpr, M: tl.constexpr,
                      N: tl.constexpr):
    tile, row, col, matrix, inside = _load_from_stack(x, rows, cols, matrix_stride, row_stride, M, N)
    tile = tile.to(tl.float32)
    scaled = tl.where(tl.abs(tile) < float("inf"), tile * tl.load(multiplier), float("nan"))
    _store_turned(out + matrix * rows * cols, scaled.to(TYPE).to(tl.uint8, bitcast=True), row, col, rows, inside)


@triton.jit
def _transpose_tile(x, out, rows, cols, matrix_stride, row_stride, M: tl.constexpr, N: tl.constexpr):
    tile, row, col, matrix, inside = _load_from_stack(x, rows, cols, matrix_stride, row_stride, M, N)
    _store_turned(out + matrix * rows * cols, tile, row, col, rows, inside)


@triton.jit
def _load_from_stack(x, rows, cols, matrix_stride, row_stride, M: tl.constexpr, N: tl.constexpr):
    """A program's tile of a stack of matrices, its rows (int64) and columns, its matrix (int64), and what is inside."""
    i, j, matrix = tile_in_stack((rows + M - 1) // M, (cols + N - 1) // N)
    row = i.to(tl.int64) * M + tl.arange(0, M)
    col = j * N + tl.arange(0, N)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    tile = tl.load(x + matrix * matrix_stride + row[:, None] * row_stride + col[None, :], mask=inside, other=0)
    return tile, row, col, matrix, inside


@triton.jit
def _store_turned(out, tile, row, col, rows, inside):
    """The tile's transpose into a row-major matrix of which each row has ``rows`` elements."""
    tl.store(out + col[:, None].to(tl.int64) * rows + row[None, :], tl.trans(tile), mask=tl.trans(inside))


def cast(x: Tensor, multiplier: Tensor, dtype: torch.dtype, *, plain: bool, transposed: bool,
         index: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``x · multiplier`` to nearest even, saturating, and its transpose, from one read of ``x``; NaN where x is not
    finite, whatever the multiplier.

    Args:
        x: ``[R, K]`` float32, bfloat16 or float16 on a GPU, row-major. multiplier: one fp32, or one a column if
            only the transpose is wanted.
        dtype: float8_e4m3fn (compute capability 8.9 and above) or float8_e5m2.
        index: integers, contiguous: which rows of x are cast, as many as it names, −1 for zeros; None for all.
    Returns:
        ``[R, K]`` and ``[K, R]`` of ``dtype``, row-major; what was not asked for is ``[0]``.
    Raises:
        ValueError: another dtype or shape.
    """
    r, k = x.shape if x.dim() == 2 else (0, 0)
    columns = multiplier.numel() != 1
    if x.dim() != 2 or x.dtype not in DTYPES or dtype not in _TYPES or columns and (multiplier.numel() != k or plain):
        raise ValueError(f"cast needs a 2-D float tensor, one multiplier and an FP8 dtype, got {x.dtype} "
                         f"{list(x.shape)}, {list(multiplier.shape)} and {dtype}")
    x = x if x.stride(1) == 1 else x.contiguous()
    if x.dtype is torch.float32 and not columns and transposed:
        # Triton 3.6 writes a wrong transpose of bytes that were made from fp32 in the same kernel
        codes, _ = cast(x, multiplier, dtype, plain=True, transposed=False, index=index)
        return codes if plain else codes.new_empty(0), transpose(codes)
    if transposed and not columns and index is None and r % tensors.WORD == 0:
        made = tensors.cast([x], multiplier, dtype, plain=plain, turned=True)
        return (made[0] if plain else x.new_empty(0, dtype=dtype)), made[-1]
    r = r if index is None else len(index)
    codes = x.new_empty((r, k) if plain else 0, dtype=dtype)
    flipped = x.new_empty((k, r) if transposed else 0, dtype=dtype)
    if r and k:
        m, n = (64, 128) if transposed else (16, 512)
        with on_device(x):
            launch(_cast_tile, (cdiv(r, m), cdiv(k, n)),
                   (x, index, multiplier, codes.view(torch.uint8), flipped.view(torch.uint8), r, k, x.stride(0)),
                   TYPE=_TYPES[dtype], PLAIN=plain, TRANSPOSED=transposed, COLUMNS=columns, M=m, N=n, num_warps=8)
    return codes, flipped


def cast_stack(x: Tensor, multiplier: Tensor, dtype: torch.dtype, *, turned: bool) -> Tensor:
    """:func:`cast` of matrices ``[E, R, K]`` by one multiplier, row-major ``[E, R, K]``; each one's transpose where
    ``turned``, ``[E, K, R]``.

    Raises:
        ValueError: another dtype or shape.
    """
    if x.dim() != 3 or x.dtype not in DTYPES or dtype not in _TYPES or multiplier.numel() != 1:
        raise ValueError(f"cast_stack needs a 3-D float tensor, one multiplier and an FP8 dtype, got {x.dtype} "
                         f"{list(x.shape)}, {list(multiplier.shape)} and {dtype}")
    e, r, k = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    if not turned or x.dtype is torch.float32:  # see cast
        codes, _ = cast(x.flatten(0, 1), multiplier, dtype, plain=True, transposed=False)
        return transpose(codes.view(e, r, k)) if turned else codes.view(e, r, k)
    out = x.new_empty(e, k, r, dtype=dtype)
    if x.numel():
        with on_device(x):
            launch(_cast_turned_tile, (cdiv(r, 64) * cdiv(k, 128) * e,),
                   (x, multiplier, out.view(torch.uint8), r, k, x.stride(0), x.stride(1)),
                   TYPE=_TYPES[dtype], M=64, N=128, num_warps=8)
    return out


def transpose(x: Tensor) -> Tensor:
    """Row-major ``[…, K, R]`` copy of the transposes of one-byte matrices ``[R, K]`` or ``[E, R, K]`` on a GPU."""
    if x.dim() not in (2, 3) or x.element_size() != 1 or x.stride(-1) != 1:
        raise ValueError("transpose needs a matrix, or a stack of them, of one-byte elements with rows in memory, got "
                         f"{x.dtype} {list(x.shape)} with strides {list(x.stride())}")
    *stack, r, k = x.shape
    out = x.new_empty(*stack, k, r)
    if x.numel():
        with on_device(x):
            launch(_transpose_tile, (cdiv(r, 128) * cdiv(k, 64) * prod(stack),),
                (x.view(torch.uint8), out.view(torch.uint8), r, k, x.stride(0) if stack else 0, x.stride(-2)),
                M=128, N=64, num_warps=8)
    return out
