"""Triton kernels of FP8 operands with a scale for the part of a row in each group of tokens.

Two passes over memory: the largest magnitudes, joined by maxima of their bits, which come out the same in any order,
and, after a division for each of these, the codes. What is read lies as ``[tokens, rows]``, what is written as
``[rows, tokens]``: four tokens of a row are packed into a word first, so that words change places and not bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quartet.kernels.spec import QuantSpec
from quartet.kernels.triton.bytes.codes import fp8_words
from quartet.kernels.triton.bytes.scales import multiplier_of
from quartet.kernels.triton.host import DTYPES, cdiv, hardware, on_device, power_of_two
from quartet.kernels.triton.launch import launch
from quartet.kernels.triton.memory import load_fours
from quartet.kernels.triton.quantize.blocks import amax_bits

CHUNK = 256  # tokens whose largest magnitudes a program finds
_ELEMENTS = ("e4m3", "e5m2")
_RULES = ("amax", "amax_pow2")


@triton.jit
def _group_of(ends, token, groups, G: tl.constexpr):
    """Group of a token; what lies behind the last one counts as its."""
    each = tl.arange(0, G)
    before = (tl.load(ends + each, mask=each < groups, other=0x7FFFFFFF) <= token).to(tl.int32)
    return tl.minimum(tl.sum(before, 0), groups - 1)


@triton.jit
def _end_of(ends, group, groups, tokens):
    return tl.where(group < groups - 1, tl.load(ends + group), tokens)


@triton.jit
def _scaled_between(tiles, by, token, start, end):
    """The tiles of :func:`load_fours`, multiplied at the tokens from ``start`` to before ``end``."""
    scaled = ()
    for k in tl.static_range(4):
        inside = ((token + k >= start) & (token + k < end))[:, None]
        scaled = scaled + (tl.where(inside, tiles[k] * by, tiles[k]),)
    return scaled


@triton.jit
def group_amax(x, ends, largest, rows, tokens, groups, stride, G: tl.constexpr, CHUNK: tl.constexpr, M: tl.constexpr,
               N: tl.constexpr):
    """Raise ``largest [groups, rows]``, the bits of magnitudes, by CHUNK tokens of N rows."""
    column = tl.program_id(0) * N + tl.arange(0, N)
    start = tl.program_id(1) * CHUNK
    stop = tl.minimum(start + CHUNK, tokens)
    group = _group_of(ends, start, groups, G)
    while start < stop:
        end = tl.minimum(_end_of(ends, group, groups, tokens), stop)
        if start < end:
            top = tl.zeros((M, N), tl.int32)
            while start < end:
                top = tl.maximum(top, amax_bits(load_fours(x, start + 4 * tl.arange(0, M), column, end, rows, stride),
                                                4))
                start += 4 * M
            tl.atomic_max(largest + group.to(tl.int64) * rows + column, tl.max(top, 0), mask=column < rows,
                          sem="relaxed")
        start = end
        group += 1


@triton.jit
def group_scales(largest, multipliers, scales, rows, groups, MAX: tl.constexpr, POW2: tl.constexpr, M: tl.constexpr,
                 N: tl.constexpr):
    """``multipliers [groups, rows]`` and ``scales [rows, groups]`` of M groups and N rows.

    Apart from the casts, where each would be divided by every warp again.
    """
    row, group = tl.program_id(0) * N + tl.arange(0, N), tl.program_id(1) * M + tl.arange(0, M)
    inside = (group < groups)[:, None] & (row < rows)[None, :]
    at = group.to(tl.int64)[:, None] * rows + row[None, :]
    multiplier = multiplier_of(tl.load(largest + at, mask=inside, other=0), MAX, POW2)
    tl.store(multipliers + at, multiplier, mask=inside)
    tl.store(scales + row.to(tl.int64)[:, None] * groups + group[None, :],
             tl.trans(tl.div_rn(tl.full(multiplier.shape, 1.0, tl.float32), multiplier)), mask=tl.trans(inside))


@triton.jit
def cast_groups(x, ends, multipliers, codes, rows, tokens, groups, stride, pitch, ELEMENT: tl.constexpr,
                HARDWARE: tl.constexpr, WIDE: tl.constexpr, G: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Codes of 4 · M tokens of N rows by ``multipliers [groups, rows]``.

    WIDE: ``codes`` points to words, and ``pitch`` is sixteenths of the tokens; else to bytes, and it is the tokens.
    """
    column = tl.program_id(0) * N + tl.arange(0, N)
    turn = tl.num_programs(1) - 1 - tl.program_id(1)  # last tokens first: the search has left them in the cache
    start = turn * (4 * M)
    token = start + 4 * tl.arange(0, M)
    tiles = load_fours(x, token, column, tokens, rows, stride)
    stop = tl.minimum(start + 4 * M, tokens)
    group = _group_of(ends, start, groups, G)
    while start < stop:
        end = _end_of(ends, group, groups, tokens)
        if start < end:
            by = tl.load(multipliers + group.to(tl.int64) * rows + column, mask=column < rows, other=0.0)
            tiles = _scaled_between(tiles, by[None, :], token, start, end)
        start = end
        group += 1

    words = tl.trans(fp8_words(tiles, ELEMENT, HARDWARE))
    row = column.to(tl.int64)[:, None]
    if WIDE:
        word = (turn * M + tl.arange(0, M))[None, :]
        tl.store(codes + row * (pitch * 4) + word, words, mask=(row < rows) & (word < pitch * 4))
    else:
        for k in tl.static_range(4):
            at = token[None, :] + k
            tl.store(codes + row * pitch + at, (words >> (8 * k)).to(tl.uint8), mask=(row < rows) & (at < tokens))


def quantize_groups(x: Tensor, spec: QuantSpec, ends: Tensor) -> tuple[Tensor, Tensor]:
    """``reference.grouped.quantize_groups`` of FP8 rows, bit for bit, without asking the host where groups end.

    Reads x twice; first copies one whose rows do not lie beside each other (``x.stride(0) != 1``).

    Args:
        x: ``[rows, tokens]`` float32, bfloat16 or float16 on a GPU; fast as the transpose of a row-major tensor with a
            multiple of 16 rows.
        spec: e4m3 or e5m2 rows with fp32 scales, rule ``amax`` or ``amax_pow2``.
        ends: int32 ``[E]``, non-decreasing, on the same device: where each group ends along the tokens. What lies
            behind the last end counts to the last group.
    Returns:
        codes, row-major ``[rows, tokens]``; fast with a multiple of 16 tokens. fp32 scales, row-major ``[rows, E]``;
        1 for a group without tokens, NaN, as its codes, where one has a NaN or an infinity in that row.
    Raises:
        ValueError: another quantiser, dtype or shape.
    """
    _check(x, spec, ends)
    x = x if x.stride(0) == 1 else x.t().contiguous().t()
    (rows, tokens), (groups,) = x.shape, ends.shape
    codes, scales = x.new_empty(rows, tokens, dtype=spec.format.storage), x.new_empty(rows, groups, dtype=torch.float32)
    if not rows:
        return codes, scales
    ends, sizes, covering = ends.contiguous(), (rows, tokens, groups, x.stride(1)), power_of_two(groups)
    largest = x.new_zeros(groups, rows, dtype=torch.int32)
    multipliers = torch.empty_like(largest, dtype=torch.float32)
    wide = tokens % 16 == 0
    with on_device(x):
        if tokens:
            launch(group_amax, (cdiv(rows, 128), cdiv(tokens, CHUNK)), (x, ends, largest, *sizes),
                   G=covering, CHUNK=CHUNK, M=16, N=128, num_warps=8)
        launch(group_scales, (cdiv(rows, 32), cdiv(groups, 32)), (largest, multipliers, scales, rows, groups),
               MAX=spec.max, POW2=spec.rule == "amax_pow2", M=32, N=32, num_warps=4)
        if tokens:
            launch(cast_groups, (cdiv(rows, 64), cdiv(tokens, 128)),
                   (x, ends, multipliers, codes.view(torch.int32 if wide else torch.uint8), *sizes,
                    tokens // 16 if wide else tokens),
                   ELEMENT=spec.element, HARDWARE=hardware(x.device, rows, tokens), WIDE=wide, G=covering,
                   M=32, N=64, num_warps=8)
    return codes, scales


def _check(x: Tensor, spec: QuantSpec, ends: Tensor) -> None:
    if spec.element not in _ELEMENTS or (spec.block, spec.scale) != ("row", "fp32") or spec.rule not in _RULES:
        raise ValueError(f"no kernel quantises groups by '{spec}'; it takes e4m3/row or e5m2/row with fp32 scales by "
                         "amax or amax_pow2; use quartet.kernels.reference.products.grouped")
    if x.dim() != 2 or x.dtype not in DTYPES:
        raise ValueError(f"groups are quantised of a 2-D float32, bfloat16 or float16 tensor, not {x.dtype} "
                         f"{list(x.shape)}")
    if ends.dim() != 1 or not ends.numel() or ends.dtype != torch.int32 or ends.device != x.device:
        raise ValueError(f"ends of groups are int32 [E] on {x.device} with at least one group, not {ends.dtype} "
                         f"{list(ends.shape)} on {ends.device}")
