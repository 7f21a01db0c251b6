"""Triton kernels along columns: the quantiser of the transpose, from the tensor or from its packed codes."""

from __future__ import annotations

import triton
import triton.language as tl

from quartet.kernels.triton.memory import column_of, load_down, load_elements_down, swizzled, tile_in_stack
from quartet.kernels.triton.quantize.blocks import signed
from quartet.kernels.triton.quantize.quantizer import round_keys
from quartet.kernels.triton.quantize.rows import quantize_row_units, quantize_unit, store_unit, value_of


@triton.jit
def quantize_both(x, rows, cols, row_stride,
                  row_signs, row_seed, row_codes, row_scale_bytes, row_masks, row_site, row_encode,
                  column_signs, column_seed, column_codes, column_scale_bytes, column_masks, column_site, column_encode,
                  given, given_row, given_column,
                  ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr, WORDS: tl.constexpr,
                  ALL: tl.constexpr, L: tl.constexpr):
    """A tile of a unit of rows and L · PER columns, quantised along its columns and, with ROWS, along its rows too.

    COLUMNS, ROWS: a ``ChainConstants`` each, ROWS None where the rows are not wanted.
    A lane owns one column; with WORDS those of a 32-bit word, which it keeps and quantises one after the other: rows
    start at words, fewer than 2^32 words apart, and consist of whole words. ALL: no tile goes beyond the tensor.
    The second reading of the tile finds it in the cache. Scales are given along the columns, if anywhere.
    """
    N: tl.constexpr = COLUMNS.unit
    TYPE: tl.constexpr = x.dtype.element_ty
    PER: tl.constexpr = 32 // TYPE.primitive_bitwidth if WORDS else 1
    first = tl.program_id(0).to(tl.int64) * N
    lane = tl.arange(0, L)
    column = (tl.program_id(1) * L + lane) * PER
    inside = column < cols
    limit = tl.where(inside, tl.minimum(rows - first, N), 0).to(tl.int32)
    stride = row_stride + first * 0  # 64 bits: rows may lie far apart
    tile = x + first * stride + column
    height = (rows + N - 1) // N
    keys = round_keys(column_seed, COLUMNS.spec.stochastic)
    out = (column_codes, column_scale_bytes, column_masks)
    tensor = (column_encode, given, given_row, given_column)
    if WORDS:
        words = load_down(tile.to(tl.pointer_type(tl.int32), bitcast=True), stride // PER, limit, N, ALL)
        for c in range(PER):
            _quantize_column(column_of(words, c, N, TYPE), (column + c).to(tl.int64), tl.program_id(0), inside, height,
                             column_signs, keys, out, column_site, tensor, COLUMNS)
    else:
        values = load_elements_down(tile, stride, limit, N)
        _quantize_column(values, column.to(tl.int64), tl.program_id(0), inside, height, column_signs, keys, out,
                         column_site, tensor, COLUMNS)
    if ROWS is not None:
        RN: tl.constexpr = ROWS.unit
        keys = round_keys(row_seed, ROWS.spec.stochastic)
        ACROSS: tl.constexpr = L * PER // RN
        for turn in range((N * ACROSS + L - 1) // L):
            unit = turn * L + lane
            quantize_row_units(x, row_signs, keys, (row_codes, row_scale_bytes, row_masks), first + unit // ACROSS,
                               tl.program_id(1) * ACROSS + unit % ACROSS, tl.minimum(rows, first + N), cols,
                               stride, (cols + RN - 1) // RN, row_site, (row_encode, None, 0, 0), ROWS, WIDE)


@triton.jit
def _quantize_column(values, row, unit, inside, height, signs, keys, out, site, tensor, CHAIN: tl.constexpr):
    """Quantise and store a unit of rows of one column a lane: one of ``row`` of a transpose ``height`` units wide."""
    packed, masks, scales = quantize_unit(values, signs, keys, site, row, unit, height, inside, tensor, CHAIN)
    store_unit(packed, masks, scales, out, row, unit, height, inside, CHAIN)


@triton.jit
def requantize_columns(code_words, scale_bytes, signs, seed, out_codes, out_scale_bytes, rows, words, site,
                       IN_BLOCK: tl.constexpr, CHAIN: tl.constexpr, ALL: tl.constexpr, B: tl.constexpr):
    """The eight columns of B words of a unit of packed rows, dequantised, rotated and quantised along the rows.

    Matrices of so many rows lie below each other, as their transposes do. ALL: no tile goes beyond a matrix.
    CHAIN: a ``ChainConstants`` without a mask. Swizzled scales are read as they are written, and of one matrix.
    """
    N: tl.constexpr = CHAIN.unit
    height = (rows + N - 1) // N
    unit, strip, matrix = tile_in_stack(height, (words + B - 1) // B)
    first = unit.to(tl.int64) * N
    code_words += matrix * rows * words
    scale_bytes += matrix * rows * (words * 8 // IN_BLOCK)
    j = strip * B + tl.arange(0, B)
    inside = j < words
    limit = tl.where(inside, tl.minimum(rows - first, N), 0).to(tl.int32)
    width = words + first * 0
    nibbles = load_down(code_words + first * width + j, width, limit, N, ALL)
    bytes_ = _scales_down(scale_bytes, first, j * 8 // IN_BLOCK, width * 8 // IN_BLOCK, limit, N, CHAIN.swizzled,
                          ALL)
    scales = ()
    for i in tl.static_range(N):
        # an infinite scale in place of NaN makes infinities or NaN of the block all the same
        scales = scales + (tl.maximum(bytes_[i] << 23, 1 << 22).to(tl.float32, bitcast=True),)
    if signs is not None:  # a row has one sign for all its columns
        scales = signed(scales, signs, N, CHAIN.rotation)
    keys = round_keys(seed, CHAIN.spec.stochastic)
    for c in range(8):
        values = ()
        for i in tl.static_range(N):
            values = values + (value_of(nibbles[i] << (28 - 4 * c)) * scales[i],)
        _quantize_column(values, matrix * words * 8 + j * 8 + c, unit, inside, height, None, keys,
                         (out_codes, out_scale_bytes, None), site, (None, None, 0, 0), CHAIN)


@triton.jit
def _scales_down(scale_bytes, first, column, columns, limit, N: tl.constexpr, SWIZZLED: tl.constexpr,
                 ALL: tl.constexpr):
    """The scale bytes of N rows from ``first``, a multiple of N, on, in one of ``columns`` columns a lane."""
    if SWIZZLED:  # 32 rows of a column lie 16 bytes apart
        bytes_ = ()
        for q in tl.static_range(N // 32):
            at = swizzled(first + 32 * q, column, columns)
            bytes_ = bytes_ + load_down(scale_bytes + at, first * 0 + 16, limit - 32 * q, 32, ALL)
        return bytes_
    else:
        return load_down(scale_bytes + first * columns + column, columns, limit, N, ALL)
