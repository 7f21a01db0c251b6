"""FP8 in blocks and tiles, along rows, along columns, or along both from one read.

A program has a tile that whole blocks fill either way, as four tiles of every fourth row: a thread then has four rows
of a column, whose codes make a word of a transposed row.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from quartet.kernels.spec import QuantSpec, dtype_name
from quartet.kernels.triton.bytes.codes import encode, fp8_words
from quartet.kernels.triton.bytes.scales import magnitude, magnitude_of_four, scales_of
from quartet.kernels.triton.host import DTYPES, cdiv, hardware, on_device
from quartet.kernels.triton.launch import launch
from quartet.kernels.triton.memory import load_fours, store_where_made

Two = tuple[Tensor, Tensor]
Four = tuple[Tensor, Tensor, Tensor, Tensor]


@triton.jit
def quantize_tiles(x, codes, scales, turned_words, turned_scales, rows, cols, row_stride, padded, turned_padded,
                   ROWS: tl.constexpr, COLUMNS: tl.constexpr, HARDWARE: tl.constexpr, M: tl.constexpr,
                   N: tl.constexpr):
    """4 · M rows and N columns, quantised along the rows by ROWS and along the columns by COLUMNS, None for neither.

    ``padded``: columns of ``codes [rows, padded]``; ``turned_padded``: those of ``[cols, turned_padded]``, four of
    which are one of ``turned_words``.
    """
    across = (cols + N - 1) // N
    line, first = (tl.program_id(0) // across).to(tl.int64), tl.program_id(0) % across * N
    # along columns alone a thread has two rows of each of the four tiles: let them be neighbours
    TURNS: tl.constexpr = 2 if ROWS is None else 1
    row, col = line * (4 * M) + 4 * _in_turn(M, TURNS), first + tl.arange(0, N)
    tiles = load_fours(x, row, col, rows, cols, row_stride)
    if ROWS is not None:
        BLOCK: tl.constexpr = ROWS.block
        ELEMENT: tl.constexpr = ROWS.element
        PER: tl.constexpr = N // BLOCK
        block = first // BLOCK + tl.arange(0, PER)
        if ROWS.tile:
            by, scale = scales_of(_amax_of_parts(magnitude_of_four(tiles), 4 * M // BLOCK, PER, TURNS), ROWS)
            _store_scales(scales, scale, line * (4 * M // BLOCK) + tl.arange(0, 4 * M // BLOCK), block,
                          (rows + BLOCK - 1) // BLOCK, padded // BLOCK)
            every = _spread(by, M, N, TURNS)
        for k in tl.static_range(4):
            if not ROWS.tile:
                by, scale = scales_of(_amax_of_parts(magnitude(tiles[k]), M, PER, TURNS), ROWS)
                store_where_made(scales + (row + k)[:, None] * (padded // BLOCK) + block[None, :], scale,
                                 (row + k < rows)[:, None] & (block < padded // BLOCK)[None, :])
                every = _spread(by, M, N, TURNS)
            made = encode(tiles[k] * every, ELEMENT, HARDWARE)
            tl.store(codes + (row + k)[:, None] * padded + col[None, :], made,
                     mask=(row + k < rows)[:, None] & (col < padded)[None, :])
    if COLUMNS is not None:
        if ROWS is not None:
            tiles = load_fours(x, row, col, rows, cols, row_stride)  # from the cache: registers for both are too many
        SIZE: tl.constexpr = COLUMNS.block
        TURNED: tl.constexpr = COLUMNS.element
        GROUPS: tl.constexpr = 4 * M // SIZE
        group = line * GROUPS + tl.arange(0, GROUPS)
        SCALES: tl.constexpr = N // SIZE if COLUMNS.tile else N
        by, scale = scales_of(_amax_of_parts(magnitude_of_four(tiles), GROUPS, SCALES, TURNS), COLUMNS)
        if COLUMNS.tile:
            _store_scales(turned_scales, tl.trans(scale), (first // SIZE + tl.arange(0, N // SIZE)).to(tl.int64), group,
                          (cols + SIZE - 1) // SIZE, turned_padded // SIZE)
        else:
            _store_scales(turned_scales, tl.trans(scale), col.to(tl.int64), group, cols, turned_padded // SIZE)
        every = _spread(by, M, N, TURNS)
        words = fp8_words((tiles[0] * every, tiles[1] * every, tiles[2] * every, tiles[3] * every), TURNED, HARDWARE)
        words = tl.reshape(tl.permute(tl.reshape(words, (TURNS, M // TURNS, N)), (1, 0, 2)), (M, N))
        word = line * M + tl.arange(0, M)
        tl.store(turned_words + col.to(tl.int64)[:, None] * (turned_padded // 4) + word[None, :], tl.trans(words),
                 mask=(col < cols)[:, None] & (word < turned_padded // 4)[None, :])


@triton.jit
def _in_turn(M: tl.constexpr, TURNS: tl.constexpr):
    """0 … M − 1, first every TURNS-th."""
    i = tl.arange(0, M)
    return i % (M // TURNS) * TURNS + i // (M // TURNS)


@triton.jit
def _amax_of_parts(top, R: tl.constexpr, C: tl.constexpr, TURNS: tl.constexpr):
    """``[R, C]`` of a tile in as many parts of equal size, whose rows are :func:`_in_turn`."""
    M: tl.constexpr = top.shape[0]
    N: tl.constexpr = top.shape[1]
    if C < N:
        top = tl.max(tl.reshape(top, (M, C, N // C)), 2)
    if R < M:
        if TURNS > 1:
            top = tl.max(tl.reshape(top, (TURNS, M // TURNS, C)), 0)
        top = tl.max(tl.reshape(top, (R, M // TURNS // R, C)), 1)
    return top


@triton.jit
def _spread(by, M: tl.constexpr, N: tl.constexpr, TURNS: tl.constexpr):
    """``[M, N]`` of one number for each of the parts of :func:`_amax_of_parts`."""
    R: tl.constexpr = by.shape[0]
    C: tl.constexpr = by.shape[1]
    H: tl.constexpr = M // TURNS
    turn = tl.reshape(tl.broadcast_to(by[:, None, :, None], (R, H // R, C, N // C)), (H, N))
    return tl.reshape(tl.broadcast_to(turn[None, :, :], (TURNS, H, N)), (M, N))


@triton.jit
def _store_scales(scales, values, row, column, rows, cols):
    """``values`` at ``row`` (int64) and ``column`` of row-major ``[rows, cols]``, as far as they are inside."""
    tl.store(scales + row[:, None] * cols + column[None, :], values,
             mask=(row < rows)[:, None] & (column < cols)[None, :])


def quantize(x: Tensor, spec: QuantSpec) -> Two:
    """``reference.quantize`` along the last axis of FP8 in blocks or tiles, bit for bit but for the sign of a NaN.

    Args:
        x: ``[R, K]`` float32, bfloat16 or float16 on a GPU; fast with rows or columns in memory.
        spec: what :func:`supports` takes.
    Returns:
        float8 codes ``[R, Kp]``, K rounded up to a multiple of the block, and scales, uint8 or fp32, ``[R, Kp/block]``,
        of tiles ``[⌈R/block⌉, Kp/block]``; row-major.
    Raises:
        ValueError: another quantiser, dtype or shape.
    """
    if x.dim() == 2 and x.stride(1) != 1 and x.stride(0) == 1:
        return _quantize(x.t(), None, spec)[2:]
    return _quantize(x, spec, None)[:2]


def quantize_both(x: Tensor, along_rows: QuantSpec, along_columns: QuantSpec) -> Four:
    """:func:`quantize` of ``x`` and of ``x.t()``, from one read: two codes and scales, one after the other."""
    return _quantize(x, along_rows, along_columns)


def _quantize(x: Tensor, along_rows: QuantSpec | None, along_columns: QuantSpec | None) -> Four:
    for spec in (along_rows, along_columns):
        reason = None if spec is None else supports(spec, x.dtype)
        if reason is not None:
            raise ValueError(reason)
    if x.dim() != 2:
        raise ValueError(f"blocks are quantised of a 2-D tensor, got {list(x.shape)}; flatten the leading axes with "
                         "x.reshape(-1, x.shape[-1])")
    x = x if x.stride(1) == 1 else x.contiguous()
    (r, k) = x.shape
    (codes, scales), (turned, turned_scales) = _out(x, r, k, along_rows), _out(x, k, r, along_columns)
    if x.numel():
        m, n, warps = _tile(along_rows, along_columns)
        with on_device(x):
            launch(quantize_tiles, (cdiv(r, m) * cdiv(k, n),),
                   (x, codes.view(torch.uint8), scales, turned.view(torch.uint8).view(torch.int32), turned_scales, r, k,
                    x.stride(0), codes.shape[-1], turned.shape[-1]),
                   ROWS=along_rows, COLUMNS=along_columns, HARDWARE=hardware(x.device, r, k), M=m // 4, N=n,
                   num_warps=warps)
    return codes, scales, turned, turned_scales


def _tile(along_rows: QuantSpec | None, along_columns: QuantSpec | None) -> tuple[int, int, int]:
    """Rows and columns of a program's tile, which blocks of 16 to 128 divide, and its warps: the fastest on an H200."""
    if along_columns is None:
        return 128, 128, 4 if along_rows is not None and along_rows.tile else 8
    if along_columns.tile:
        return 128, 128, 8
    if along_rows is not None:
        return 128, max(64, int(along_rows.block)), 4
    return (256, 64, 8) if along_columns.block == 128 else (128, 64, 4)


def _out(x: Tensor, r: int, k: int, spec: QuantSpec | None) -> Two:
    if spec is None:
        return x.new_empty(0, dtype=torch.uint8), x.new_empty(0, dtype=torch.uint8)
    block = int(spec.block)
    blocks = cdiv(k, block)
    return (x.new_empty(r, blocks * block, dtype=spec.format.storage),
            x.new_empty(cdiv(r, block) if spec.tile else r, blocks,
                        dtype=torch.uint8 if spec.scale == "e8m0" else torch.float32))


@cache
def supports(spec: QuantSpec, dtype: torch.dtype) -> str | None:
    """None where the kernel quantises a tensor of this dtype by ``spec``, else why not."""
    if spec.element not in ("e4m3", "e5m2") or not spec.blocked:
        return f"the kernel for blocks and tiles writes e4m3 and e5m2 in blocks, not '{spec}'"
    if spec.mask:
        return f"the kernel for blocks and tiles writes no masks, as of '{spec}'"
    if dtype not in DTYPES:
        return f"the kernel for blocks and tiles reads float32, bfloat16 and float16, not {dtype_name(dtype)}"
    return None
