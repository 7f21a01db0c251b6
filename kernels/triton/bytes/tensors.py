"""FP8 with one scale a tensor, of several tensors in a launch: largest magnitudes, scales, casts with transposes.

Programs of a launch are divided among the tensors in their order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from quartet.kernels.reference.formats.scales import APART
from quartet.kernels.spec import QuantSpec, dtype_name
from quartet.kernels.triton.bytes.codes import encode, fp8_words
from quartet.kernels.triton.bytes.scales import magnitude, multiplier_of
from quartet.kernels.triton.host import DTYPES, cdiv, hardware, on_device, power_of_two
from quartet.kernels.triton.launch import launch
from quartet.kernels.triton.memory import load_fours

TOGETHER = 8  # tensors of a launch at most: a kernel has the code of each
_ROWS, _COLUMNS = 32, 64  # of a tile: four times as many rows
_CHUNK, _CHUNKS = 4096, 4  # elements that a program reads at a time, and how often
_FEWEST, _MOST = 1024, 16384  # magnitudes that a program reads at a time
_NAMES = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
Two = tuple[Tensor, Tensor]


@triton.jit
def _amax_tile(xs, counts, bits, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """``bits[k]``, of a number that is not negative, becomes the largest of those of the k-th tensor's magnitudes."""
    first = tl.program_id(0)
    for k in tl.static_range(len(xs)):
        programs = tl.cdiv(counts[k], CHUNK * CHUNKS)
        if (first >= 0) & (first < programs):
            start = first.to(tl.int64) * (CHUNK * CHUNKS)
            top = tl.zeros((CHUNK,), tl.int32)
            for i in tl.static_range(CHUNKS):
                at = start + i * CHUNK + tl.arange(0, CHUNK)
                top = tl.maximum(top, magnitude(tl.load(xs[k] + at, mask=at < counts[k], other=0.0).to(tl.float32)))
            tl.atomic_max(bits + k, tl.max(top, 0), sem="relaxed")
        first -= programs


@triton.jit
def _scale_tile(xs, counts, multipliers, scales, MAX: tl.constexpr, POW2: tl.constexpr, APART: tl.constexpr,
                N: tl.constexpr):
    """Program k finds the k-th tensor's multiplier and scale, written APART times."""
    for k in tl.static_range(len(xs)):
        if tl.program_id(0) == k:
            top = tl.zeros((N,), tl.int32)
            for start in range(0, counts[k], N):
                at = start + tl.arange(0, N)
                top = tl.maximum(top, magnitude(tl.load(xs[k] + at, mask=at < counts[k], other=0.0).to(tl.float32)))
            by = multiplier_of(tl.broadcast_to(tl.max(top, 0, keep_dims=True), (APART,)), MAX, POW2)
            at = k * APART + tl.arange(0, APART)
            tl.store(multipliers + at, by)
            tl.store(scales + at, tl.div_rn(tl.full((APART,), 1.0, tl.float32), by))


@triton.jit
def _scaled(tile, by):
    """NaN where the tile is not finite: the conversion to FP8 saturates infinities."""
    return tl.where(tl.abs(tile) < float("inf"), tile * by, float("nan"))


@triton.jit
def _cast_tiles(xs, codes, turned, rows, cols, strides, multipliers, ELEMENT: tl.constexpr, PLAIN: tl.constexpr,
                TURNED: tl.constexpr, APART: tl.constexpr, HARDWARE: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """4 · M rows and N columns, from the last ones on, of which the cache has most if they were just written.

    ``turned``: int32 words of the codes of four rows of a column; rows are multiples of four.
    """
    first = tl.num_programs(0) - 1 - tl.program_id(0)
    for k in tl.static_range(len(xs)):
        across = tl.cdiv(cols[k], N)
        programs = tl.cdiv(rows[k], 4 * M) * across
        if (first >= 0) & (first < programs):
            line = (first // across).to(tl.int64)
            row, col = line * (4 * M) + 4 * tl.arange(0, M), first % across * N + tl.arange(0, N)
            by = tl.load(multipliers + k * APART)
            tiles = load_fours(xs[k], row, col, rows[k], cols[k], strides[k])
            values = _scaled(tiles[0], by), _scaled(tiles[1], by), _scaled(tiles[2], by), _scaled(tiles[3], by)
            if PLAIN:
                for i in tl.static_range(4):
                    tl.store(codes[k] + (row + i)[:, None] * cols[k] + col[None, :],
                             encode(values[i], ELEMENT, HARDWARE),
                             mask=(row + i < rows[k])[:, None] & (col < cols[k])[None, :])
            if TURNED:
                word = line * M + tl.arange(0, M)
                tl.store(turned[k] + col.to(tl.int64)[:, None] * (rows[k] // 4) + word[None, :],
                         tl.trans(fp8_words(values, ELEMENT, HARDWARE)),
                         mask=(col < cols[k])[:, None] & (word < rows[k] // 4)[None, :])
        first -= programs


def largest_magnitudes(xs: Sequence[Tensor]) -> Tensor:
    """fp32 ``[tensors, 1, 1]``, NaN of a tensor that has one.

    Args:
        xs: of one dtype, float32, bfloat16 or float16, on one GPU.
    Raises:
        ValueError: another dtype, or several.
    """
    _check(xs)
    parts = tuple(map(_one_behind_the_other, xs))
    made = parts[0].new_zeros(len(parts), 1, 1, dtype=torch.float32)
    with on_device(made):
        for at in range(0, len(parts), TOGETHER):
            some = parts[at:at + TOGETHER]
            programs = sum(cdiv(count, _CHUNK * _CHUNKS) for count in _counts(some))
            if programs:
                launch(_amax_tile, (programs,), (some, _counts(some), made.view(torch.int32)[at:]), CHUNK=_CHUNK,
                       CHUNKS=_CHUNKS, num_warps=8)
    return made


def scales_of(magnitudes: Sequence[Tensor], spec: QuantSpec) -> Two:
    """Multipliers and scales of :func:`quartet.kernels.reference.scale_of_amax`, fp32 ``[tensors, APART, 1]``.

    Args:
        magnitudes: of each tensor numbers whose largest is its largest magnitude, such as those of its rows; of one
            dtype. A program reads all of one tensor, so they should be some ten thousand at most.
        spec: of an FP8 element with one fp32 scale a tensor, by rule ``amax`` or ``amax_pow2``.
    Raises:
        ValueError: another dtype, or several.
    """
    _check(magnitudes)
    parts = tuple(map(_one_behind_the_other, magnitudes))
    multipliers, scales = (parts[0].new_empty(len(parts), APART, 1, dtype=torch.float32) for _ in range(2))
    n = max(_FEWEST, min(_MOST, power_of_two(max(x.numel() for x in parts))))
    with on_device(multipliers):
        for at in range(0, len(parts), TOGETHER):
            some = parts[at:at + TOGETHER]
            launch(_scale_tile, (len(some),), (some, _counts(some), multipliers[at:], scales[at:]), MAX=spec.max,
                   POW2=spec.rule == "amax_pow2", APART=APART, N=n, num_warps=n // _FEWEST * 2)
    return multipliers, scales


def cast(xs: Sequence[Tensor], multipliers: Tensor, dtype: torch.dtype, *, plain: bool, turned: bool) -> list[Tensor]:
    """Each ``x · multiplier`` to nearest even, saturating, and its transpose, from one read of ``x``; NaN where x is
    not finite.

    Args:
        xs: matrices ``[R, K]`` of one dtype on a GPU, R a multiple of four.
        multipliers: fp32, one every ``APART`` numbers.
        dtype: float8_e4m3fn or float8_e5m2.
    Returns:
        Codes ``[R, K]`` of each where ``plain``, followed by ``[K, R]`` of each where ``turned``, row-major.
    Raises:
        ValueError: another dtype or shape, several dtypes, or too few multipliers.
    """
    _check(xs)
    if any(x.dim() != 2 or x.shape[0] % 4 for x in xs) or multipliers.numel() <= (len(xs) - 1) * APART:
        raise ValueError(f"matrices are cast whose rows are a multiple of four, by one of {APART} numbers each, got "
                         f"{[list(x.shape) for x in xs]} and {multipliers.numel()} numbers")
    xs = [x if x.stride(1) == 1 else x.contiguous() for x in xs]
    codes = [x.new_empty(x.shape if plain else 0, dtype=dtype) for x in xs]
    flipped = [x.new_empty(x.shape[::-1] if turned else 0, dtype=dtype) for x in xs]
    with on_device(xs[0]):
        for at in range(0, len(xs), TOGETHER):
            some = tuple(xs[at:at + TOGETHER])
            rows, cols = zip(*(x.shape for x in some), strict=True)
            programs = sum(cdiv(r, 4 * _ROWS) * cdiv(k, _COLUMNS) for r, k in zip(rows, cols, strict=True))
            if programs and (plain or turned):
                launch(_cast_tiles, (programs,),
                       (some, tuple(x.view(torch.uint8) for x in codes[at:at + TOGETHER]),
                        tuple(x.view(torch.uint8).view(torch.int32) for x in flipped[at:at + TOGETHER]), rows, cols,
                        tuple(x.stride(0) for x in some), multipliers.flatten()[at * APART:]),
                       ELEMENT=_NAMES[dtype], PLAIN=plain, TURNED=turned, APART=APART,
                       HARDWARE=hardware(xs[0].device, *rows, *cols), M=_ROWS, N=_COLUMNS, num_warps=8)
    return [*(codes if plain else ()), *(flipped if turned else ())]


def _check(xs: Sequence[Tensor]) -> None:
    dtypes = {x.dtype for x in xs}
    if len(dtypes) != 1 or not dtypes <= set(DTYPES):
        raise ValueError(f"the tensors have to be of one dtype, float32, bfloat16 or float16, got "
                         f"{', '.join(sorted(map(dtype_name, dtypes))) or 'none'}")


def _one_behind_the_other(x: Tensor) -> Tensor:
    """The numbers of ``x``: as they lie where they fill their memory, in whatever order of the axes, else a copy."""
    if x.is_contiguous():
        return x
    lying = x.permute(sorted(range(x.dim()), key=x.stride, reverse=True))
    return lying if lying.is_contiguous() else x.contiguous()


def _counts(xs: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(x.numel() for x in xs)
