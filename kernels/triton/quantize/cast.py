"""Triton kernels for one-byte operands with one scale: cast of a tensor and of its transpose, and transposition."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quartet.kernels.spec import QuantSpec
from quartet.kernels.triton.bytes import tensors
from quartet.kernels.triton.host import DTYPES, cdiv, on_device
from quartet.kernels.triton.launch import launch
from quartet.kernels.triton.memory import tile_in_stack

_PARTS = 256  # that x is read in for its own largest magnitude
_TYPES = {torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e5m2: tl.float8e5}


class _By(NamedTuple):
    """What makes a multiplier of a largest magnitude, and the scale; the arguments of ``_cast_tile``."""

    scale: Tensor | None = None
    largest: float = 0.0
    power_of_two: bool = False
    parts: Tensor | None = None
    seen: Tensor | None = None
    margin: float = 1.0


_GIVEN = _By()


@triton.jit
def _multiplier_of(amax, LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """``reference.scale_of_amax`` by fp32 division, as exact for 7 · 2^k: of a divisor and a midpoint of fp32 numbers,
    the product, of 49 bits, differs from 7 · 2^k by 2^-49 of it at least, which fp64's rounding does not bridge."""
    by = tl.minimum(tl.div_rn(LARGEST, amax), 2.0**126)
    if POWER_OF_TWO:
        by = (by.to(tl.int32, bitcast=True) & ~0x7FFFFF).to(tl.float32, bitcast=True)
    return tl.where(amax < float("inf"), tl.where(amax == 0, 1.0, by), float("nan"))


@triton.jit
def _first_amax(x, known, parts, seen, rows, cols, row_stride, PARTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """``seen`` = 0, and where ``known`` is 0 too the bits of the largest magnitudes of PARTS parts of x."""
    part = tl.program_id(0)
    if part == 0:
        tl.store(seen, 0.0)
    if tl.load(known) == 0:
        top = tl.zeros((M, N), tl.int32)
        across = (cols + N - 1) // N
        for number in range(part, (rows + M - 1) // M * across, PARTS):
            row = (number // across).to(tl.int64) * M + tl.arange(0, M)
            col = number % across * N + tl.arange(0, N)
            inside = (row < rows)[:, None] & (col < cols)[None, :]
            tile = tl.load(x + row[:, None] * row_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
            top = tl.maximum(top, tl.abs(tile).to(tl.int32, bitcast=True))
        tl.store(parts + part, tl.max(tl.max(top, 1), 0))


@triton.jit
def _cast_tile(x, index, multiplier, scale, parts, seen, codes, transposed, rows, cols, row_stride,
               TYPE: tl.constexpr, PLAIN: tl.constexpr, TRANSPOSED: tl.constexpr, COLUMNS: tl.constexpr,
               INDEXED: tl.constexpr, LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr, MARGIN: tl.constexpr,
               PARTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """``multiplier`` holds the largest magnitude instead where the element format's, ``LARGEST``, is given. Row i is
    ``index[i]`` of x where INDEXED, zeros where that is negative.

    With ``PARTS`` it holds that of earlier steps, in place of whose 0 those of the parts of x are taken; what counts is
    MARGIN times as large, and ``seen`` becomes the largest of x.
    """
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    col = tl.program_id(1) * N + tl.arange(0, N)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    if INDEXED:
        read = tl.load(index + row, mask=row < rows, other=-1).to(tl.int64)
        there = (read >= 0)[:, None] & (col < cols)[None, :]
    else:
        read, there = row, inside
    if COLUMNS:
        by = tl.load(multiplier + col, mask=col < cols, other=0.0)[None, :]
    else:
        by = tl.load(multiplier)
    tile = tl.load(x + read[:, None] * row_stride + col[None, :], mask=there, other=0.0).to(tl.float32)
    if not COLUMNS:
        if PARTS > 0:
            first = tl.max(tl.load(parts + tl.arange(0, PARTS)), 0).to(tl.float32, bitcast=True)
            by = tl.where(by > 0, by, first) * MARGIN
            top = tl.max(tl.max(tl.abs(tile).to(tl.int32, bitcast=True), 1), 0)
            tl.atomic_max(seen.to(tl.pointer_type(tl.int32), bitcast=True), top, sem="relaxed")
        if LARGEST > 0:
            by = _multiplier_of(by, LARGEST, POWER_OF_TWO)
            if tl.program_id(0) == 0 and tl.program_id(1) == 0:
                tl.store(scale, tl.div_rn(1.0, by))
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


def quantize(x: Tensor, amax: Tensor, index: Tensor, spec: QuantSpec, *, plain: bool,
             transposed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`cast` of rows of ``x`` by the multiplier that follows from a largest magnitude, and the scale.

    Args:
        amax: one fp32. index: integers ``[R]``, contiguous: which row of x each row is, −1 for zeros.
        spec: of an FP8 element with one fp32 scale a tensor, by rule ``amax``, ``amax_pow2`` or ``delayed``.
    Returns:
        codes ``[R, K]`` and ``[K, R]`` as of :func:`cast`, and the scale fp32 ``[1, 1]`` of
        ``reference.scale_of_amax``.
    """
    scale = x.new_empty(1, 1, dtype=torch.float32)
    if x.numel() == 0 or not len(index) or amax.numel() != 1 or amax.dtype is not torch.float32:
        raise ValueError(f"quantising needs elements and one fp32 amax, got {list(x.shape)} and {amax.dtype} "
                         f"{list(amax.shape)}")
    by = _By(scale, spec.max, spec.rule == "amax_pow2")
    return *_cast(x, amax, spec.format.storage, plain, transposed, by, index), scale


def first_amax(x: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Largest magnitudes of parts of x, for :func:`quantize_delayed`, found only where ``known`` is 0; and a zero."""
    if x.dim() != 2 or x.numel() == 0 or known.numel() != 1 or known.dtype is not torch.float32:
        raise ValueError(f"quantising needs a matrix with elements and one fp32 amax, got {list(x.shape)} and "
                         f"{known.dtype} {list(known.shape)}")
    x = x if x.stride(1) == 1 else x.contiguous()
    parts, seen = x.new_empty(_PARTS, dtype=torch.int32), x.new_empty(1, 1, dtype=torch.float32)
    with on_device(x):
        launch(_first_amax, (_PARTS,), (x, known, parts, seen, *x.shape, x.stride(0)), PARTS=_PARTS, M=16, N=512,
               num_warps=8)
    return parts, seen


def quantize_delayed(x: Tensor, known: Tensor, first: tuple[Tensor, Tensor], spec: QuantSpec, margin: int, *,
                     plain: bool, transposed: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`cast` by the multiplier of ``2^margin · known``, the scale, and the largest magnitude of x, from one read.

    Args:
        known: one fp32, the largest magnitude of earlier steps; where it is 0, x is scaled by its own.
        first: of :func:`first_amax`.
    Returns:
        codes ``[R, K]`` and ``[K, R]``, the scale fp32 ``[1, 1]``, and the largest magnitude of x, fp32 ``[1, 1]``.
    """
    scale, (parts, seen) = x.new_empty(1, 1, dtype=torch.float32), first
    by = _By(scale, spec.max, parts=parts, seen=seen, margin=2.0**margin)
    return *_cast(x, known, spec.format.storage, plain, transposed, by), scale, seen


def cast(x: Tensor, multiplier: Tensor, dtype: torch.dtype, *, plain: bool,
         transposed: bool) -> tuple[Tensor, Tensor]:
    """``x · multiplier`` to nearest even, saturating, and its transpose, from one read of ``x``; NaN where x is not
    finite, whatever the multiplier.

    Args:
        x: ``[R, K]`` float32, bfloat16 or float16 on a GPU, row-major. multiplier: one fp32, or one a column if
            only the transpose is wanted.
        dtype: float8_e4m3fn (compute capability 8.9 and above) or float8_e5m2.
    Returns:
        ``[R, K]`` and ``[K, R]`` of ``dtype``, row-major; what was not asked for is ``[0]``.
    Raises:
        ValueError: another dtype or shape.
    """
    return _cast(x, multiplier, dtype, plain, transposed)


def _cast(x: Tensor, multiplier: Tensor, dtype: torch.dtype, plain: bool, transposed: bool,
          by: _By = _GIVEN, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r, k = x.shape if x.dim() == 2 else (0, 0)
    columns = multiplier.numel() != 1
    if x.dim() != 2 or x.dtype not in DTYPES or dtype not in _TYPES or columns and (multiplier.numel() != k or plain):
        raise ValueError(f"cast needs a 2-D float tensor, one multiplier and an FP8 dtype, got {x.dtype} "
                         f"{list(x.shape)}, {list(multiplier.shape)} and {dtype}")
    x = x if x.stride(1) == 1 else x.contiguous()
    if x.dtype is torch.float32 and not columns and transposed:
        # Triton 3.6 writes a wrong transpose of bytes that were made from fp32 in the same kernel
        codes, _ = _cast(x, multiplier, dtype, True, False, by, index)
        return codes if plain else codes.new_empty(0), transpose(codes)
    if transposed and not columns and index is None and by is _GIVEN and r % 4 == 0:
        made = tensors.cast([x], multiplier, dtype, plain=plain, turned=True)
        return (made[0] if plain else x.new_empty(0, dtype=dtype)), made[-1]
    r = r if index is None else len(index)
    codes = x.new_empty((r, k) if plain else 0, dtype=dtype)
    flipped = x.new_empty((k, r) if transposed else 0, dtype=dtype)
    if r and k:
        m, n = (64, 128) if transposed else (16, 512)
        with on_device(x):
            launch(_cast_tile, (cdiv(r, m), cdiv(k, n)),
                (x, index, multiplier, by.scale, by.parts, by.seen, codes.view(torch.uint8),
                 flipped.view(torch.uint8), r, k, x.stride(0)),
                TYPE=_TYPES[dtype], PLAIN=plain, TRANSPOSED=transposed, COLUMNS=columns, INDEXED=index is not None,
                LARGEST=by.largest, POWER_OF_TWO=by.power_of_two, MARGIN=by.margin,
                PARTS=0 if by.parts is None else by.parts.numel(), M=m, N=n, num_warps=8)
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
