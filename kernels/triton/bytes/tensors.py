"""FP8 with one scale a tensor, of several tensors in a launch: largest magnitudes, scales, casts with transposes, by
scales of their own or of earlier steps.

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
from quartet.kernels.triton.bytes.scales import magnitude, magnitude_of_four, multiplier_of
from quartet.kernels.triton.host import DTYPES, cdiv, hardware, on_device, power_of_two
from quartet.kernels.triton.launch import launch
from quartet.kernels.triton.memory import load_fours

WORD = 4  # rows, whose codes are written at once to the transpose
TOGETHER = 8  # tensors of a launch at most: a kernel has the code of each
_ROWS, _COLUMNS = 32, 64  # of a tile: four times as many rows
_CHUNK, _CHUNKS = 4096, 4  # elements that a program reads at a time, and how often
_FEWEST, _MOST = 1024, 16384  # magnitudes that a program reads at a time
MOST_MAGNITUDES = 8192  # that every program of a cast reads again
_PROGRAMS = 128  # of a tensor of which nothing is known
_NAMES = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
Two = tuple[Tensor, Tensor]
Three = tuple[Tensor, Tensor, Tensor]


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
            _store_scale(multipliers, scales, k, tl.max(top, 0), MAX, POW2, APART)


@triton.jit
def _known_tile(xs, known, rows, cols, strides, bits, ready, multipliers, scales, MAX: tl.constexpr,
                MARGIN: tl.constexpr, APART: tl.constexpr, PROGRAMS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Multipliers and scales of MARGIN times ``known[k]``, by the first of PROGRAMS programs for each tensor.

    Where that is not positive all of them look for the largest magnitude, in ``bits[k]`` as in :func:`_amax_tile`, and
    the last of them that is ready, as ``ready[k]`` counts, takes that instead.
    """
    for k in tl.static_range(len(xs)):
        first = tl.program_id(0) - k * PROGRAMS
        if (first >= 0) & (first < PROGRAMS):
            value = tl.load(known[k])
            if value > 0:
                if first == 0:
                    _store_scale(multipliers, scales, k, magnitude(value * MARGIN), MAX, False, APART)
            else:
                top = tl.zeros((M, N), tl.int32)
                across = tl.cdiv(cols[k], N)
                for tile in range(first, tl.cdiv(rows[k], M) * across, PROGRAMS):
                    row, col = (tile // across).to(tl.int64) * M + tl.arange(0, M), tile % across * N + tl.arange(0, N)
                    inside = (row < rows[k])[:, None] & (col < cols[k])[None, :]
                    x = tl.load(xs[k] + row[:, None] * strides[k] + col[None, :], mask=inside, other=0.0)
                    top = tl.maximum(top, magnitude(x.to(tl.float32)))
                tl.atomic_max(bits + k, tl.max(top), sem="relaxed")
                if tl.atomic_add(ready + k, 1, sem="acq_rel") == PROGRAMS - 1:
                    value = tl.atomic_max(bits + k, 0, sem="acquire").to(tl.float32, bitcast=True)
                    _store_scale(multipliers, scales, k, magnitude(value * MARGIN), MAX, False, APART)


@triton.jit
def _store_scale(multipliers, scales, k, top, MAX: tl.constexpr, POW2: tl.constexpr, APART: tl.constexpr):
    """The k-th multiplier and scale, of the bits of a largest magnitude, APART times."""
    by = multiplier_of(tl.full((APART,), 0, tl.int32) + top, MAX, POW2)
    at = k * APART + tl.arange(0, APART)
    tl.store(multipliers + at, by)
    tl.store(scales + at, tl.div_rn(tl.full((APART,), 1.0, tl.float32), by))


@triton.jit
def _scaled(tile, by):
    """NaN where the tile is not finite: the conversion to FP8 saturates infinities."""
    return tl.where(tl.abs(tile) < float("inf"), tile * by, float("nan"))


@triton.jit
def _multiplier(magnitudes, count, scale, stored, MAX: tl.constexpr, POW2: tl.constexpr, APART: tl.constexpr,
                MOST: tl.constexpr):
    """By the largest of ``count`` magnitudes, at most MOST; the scale APART times, where it is ``stored``."""
    at = tl.arange(0, MOST)
    top = tl.max(magnitude(tl.load(magnitudes + at, mask=at < count, other=0.0).to(tl.float32)), 0)
    by = multiplier_of(top, MAX, POW2)
    if stored:
        many = tl.zeros((APART,), tl.float32) + by
        tl.store(scale + tl.arange(0, APART), tl.div_rn(tl.full((APART,), 1.0, tl.float32), many))
    return by


@triton.jit
def _cast_tiles(xs, codes, turned, rows, cols, strides, table, seen, magnitudes, counts, ELEMENT: tl.constexpr,
                PLAIN: tl.constexpr, TURNED: tl.constexpr, APART: tl.constexpr, HARDWARE: tl.constexpr,
                MAX: tl.constexpr, POW2: tl.constexpr, MOST: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """4 · M rows and N columns, from the last ones on, of which the cache has most if they were just written.

    ``turned``: int32 words of the codes of four rows of a column; rows are multiples of four. ``seen[k]``, unless that
    is None: see ``bits`` of :func:`_amax_tile`. ``table``: multipliers; with ``magnitudes``, by which each program
    finds its own, where the scales go.
    """
    first = tl.num_programs(0) - 1 - tl.program_id(0)
    for k in tl.static_range(len(xs)):
        across = tl.cdiv(cols[k], N)
        programs = tl.cdiv(rows[k], 4 * M) * across
        if (first >= 0) & (first < programs):
            line = (first // across).to(tl.int64)
            row, col = line * (4 * M) + 4 * tl.arange(0, M), first % across * N + tl.arange(0, N)
            tiles = load_fours(xs[k], row, col, rows[k], cols[k], strides[k])
            if magnitudes is None:
                by = tl.load(table + k * APART)
            else:
                by = _multiplier(magnitudes[k], counts[k], table + k * APART, first == 0, MAX, POW2, APART, MOST)
            if seen is not None:
                tl.atomic_max(seen + k, tl.max(magnitude_of_four(tiles)), sem="relaxed")
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
    multipliers, scales = _tables(parts)
    n = max(_FEWEST, min(_MOST, power_of_two(max(x.numel() for x in parts))))
    with on_device(multipliers):
        for at in range(0, len(parts), TOGETHER):
            some = parts[at:at + TOGETHER]
            launch(_scale_tile, (len(some),), (some, _counts(some), multipliers[at:], scales[at:]), MAX=spec.max,
                   POW2=spec.rule == "amax_pow2", APART=APART, N=n, num_warps=n // _FEWEST * 2)
    return multipliers, scales


def scales_by_known(xs: Sequence[Tensor], known: Sequence[Tensor], spec: QuantSpec, margin: int) -> Three:
    """Multipliers and scales of ``2^margin · known``, of 2^margin times its largest magnitude for an x of which that is
    not positive; as of :func:`scales_of`.

    Args:
        xs: matrices of one dtype on a GPU, with rows in memory. known: fp32 of one element each.
        spec: of an FP8 element with one fp32 scale a tensor, by rule ``delayed``.
    Returns:
        The two, and fp32 ``[tensors, 1, 1]``: the largest magnitudes that were looked for, else 0.
    Raises:
        ValueError: another dtype, or several, or not as many ``known``.
    """
    _check(xs)
    if len(known) != len(xs) or any(value.numel() != 1 or value.dtype is not torch.float32 for value in known):
        raise ValueError(f"{len(xs)} tensors are scaled by as many magnitudes, fp32 of one element each, got "
                         f"{[(dtype_name(value.dtype), list(value.shape)) for value in known]}")
    multipliers, scales = _tables(xs)
    both = xs[0].new_zeros(2, cdiv(len(xs), 4) * 4, 1, 1, dtype=torch.float32)  # each at a multiple of 16 bytes
    seen, ready = both[0, :len(xs)], both[1]
    with on_device(seen):
        for at in range(0, len(xs), TOGETHER):
            some = tuple(xs[at:at + TOGETHER])
            launch(_known_tile, (_PROGRAMS * len(some),),
                   (some, tuple(known[at:at + TOGETHER]), *_sizes(some), seen.view(torch.int32)[at:],
                    ready.view(torch.int32)[at:], multipliers[at:], scales[at:]), MAX=spec.max, MARGIN=2.0**margin,
                   APART=APART, PROGRAMS=_PROGRAMS, M=16, N=512, num_warps=8)
    return multipliers, scales, seen


def _tables(xs: Sequence[Tensor]) -> Two:
    first, second = (xs[0].new_empty(len(xs), APART, 1, dtype=torch.float32) for _ in range(2))
    return first, second


def cast(xs: Sequence[Tensor], multipliers: Tensor, dtype: torch.dtype, *, plain: bool, turned: bool,
         seen: Tensor | None = None) -> list[Tensor]:
    """Each ``x · multiplier`` to nearest even, saturating, and its transpose, from one read of ``x``; NaN where x is
    not finite.

    Args:
        xs: matrices ``[R, K]`` of one dtype on a GPU, R a multiple of four.
        multipliers: fp32, one every ``APART`` numbers.
        dtype: float8_e4m3fn or float8_e5m2.
        seen: fp32 ``[tensors, 1, 1]``, not negative; becomes the larger of itself and each largest magnitude.
    Returns:
        Codes ``[R, K]`` of each where ``plain``, followed by ``[K, R]`` of each where ``turned``, row-major.
    Raises:
        ValueError: another dtype or shape, several dtypes, or too few multipliers.
    """
    if multipliers.numel() <= (len(xs) - 1) * APART:
        raise ValueError(f"{len(xs)} tensors are cast by one of {APART} numbers each, got {multipliers.numel()}")
    return _cast(xs, multipliers.flatten(), dtype, plain, turned, seen=seen)


def cast_by_magnitudes(xs: Sequence[Tensor], magnitudes: Sequence[Tensor], spec: QuantSpec, *, plain: bool,
                       turned: bool) -> list[Tensor]:
    """:func:`scales_of` and :func:`cast` in a launch: every program finds the scale of its tensor.

    Args:
        xs: as of ``cast``, not empty. magnitudes, spec: as of ``scales_of``, at most ``MOST_MAGNITUDES`` each.
    Returns:
        What ``cast`` does, and the scales, fp32 ``[tensors, APART, 1]``.
    Raises:
        ValueError: another dtype or shape, several dtypes, or not as many or too many magnitudes.
    """
    counts = _counts(magnitudes)
    if len(counts) != len(xs) or not all(0 < count <= MOST_MAGNITUDES for count in counts) or 0 in _counts(xs):
        raise ValueError(f"tensors that are not empty are cast by at most {MOST_MAGNITUDES} magnitudes each, got "
                         f"{[list(x.shape) for x in xs]} and {[list(x.shape) for x in magnitudes]}")
    _check(magnitudes)
    _, scales = _tables(xs)
    made = _cast(xs, scales.flatten(), spec.format.storage, plain, turned, spec=spec,
                 magnitudes=[_one_behind_the_other(x) for x in magnitudes])
    return [*made, scales]


def _cast(xs: Sequence[Tensor], table: Tensor, dtype: torch.dtype, plain: bool, turned: bool, *,
          seen: Tensor | None = None, magnitudes: Sequence[Tensor] = (), spec: QuantSpec | None = None) -> list[Tensor]:
    _check(xs)
    if any(x.dim() != 2 or x.shape[0] % WORD for x in xs):
        raise ValueError(f"matrices are cast whose rows are a multiple of four, got {[list(x.shape) for x in xs]}")
    xs = [x if x.stride(1) == 1 else x.contiguous() for x in xs]
    codes = [x.new_empty(x.shape if plain else 0, dtype=dtype) for x in xs]
    flipped = [x.new_empty(x.shape[::-1] if turned else 0, dtype=dtype) for x in xs]
    with on_device(xs[0]):
        for at in range(0, len(xs), TOGETHER):
            some, of_rows = tuple(xs[at:at + TOGETHER]), tuple(magnitudes[at:at + TOGETHER])
            rows, cols, strides = _sizes(some)
            programs = sum(cdiv(r, 4 * _ROWS) * cdiv(k, _COLUMNS) for r, k in zip(rows, cols, strict=True))
            if programs and (plain or turned):
                launch(_cast_tiles, (programs,),
                       (some, tuple(x.view(torch.uint8) for x in codes[at:at + TOGETHER]),
                        tuple(x.view(torch.uint8).view(torch.int32) for x in flipped[at:at + TOGETHER]), rows, cols,
                        strides, table[at * APART:], None if seen is None else seen.view(torch.int32)[at:],
                        of_rows or None, _counts(of_rows) or None),
                       ELEMENT=_NAMES[dtype], PLAIN=plain, TURNED=turned, APART=APART,
                       HARDWARE=hardware(xs[0].device, *rows, *cols), MAX=spec.max if spec else 0.0,
                       POW2=spec is not None and spec.rule == "amax_pow2",
                       MOST=max(map(power_of_two, _counts(of_rows)), default=1), M=_ROWS, N=_COLUMNS, num_warps=8)
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


def _sizes(xs: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    """Rows, columns, and how far apart rows lie, of matrices."""
    return tuple(x.shape[0] for x in xs), tuple(x.shape[1] for x in xs), tuple(x.stride(0) for x in xs)


def _counts(xs: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(x.numel() for x in xs)
