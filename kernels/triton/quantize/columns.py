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
                  column_signs, column_seed, column_codes, column_scale_bytes, column_masks, column_site, encode,
                  given, given_row, given_column,
                  ROWS: tl.constexpr, RN: tl.constexpr, RR: tl.constexpr, RS: tl.constexpr, RB: tl.constexpr,
                  RRULE: tl.constexpr, RSIGMA: tl.constexpr, RPOWER: tl.constexpr, RSR: tl.constexpr,
                  RTILE: tl.constexpr, RHW: tl.constexpr, RM: tl.constexpr, N: tl.constexpr, ROTATION: tl.constexpr,
                  SIGNED: tl.constexpr, BLOCK: tl.constexpr, RULE: tl.constexpr, SIGMA: tl.constexpr,
                  POWER: tl.constexpr, STOCHASTIC: tl.constexpr, TILE: tl.constexpr, HARDWARE: tl.constexpr,
                  MASK: tl.constexpr, SWIZZLED: tl.constexpr, WIDE: tl.constexpr, WORDS: tl.constexpr,
                  ALL: tl.constexpr, L: tl.constexpr):
    """A tile of N rows and L · PER columns, quantised along its columns and, with ROWS, along its rows too.

    A lane owns one column; with WORDS those of a 32-bit word, which it keeps and quantises one after the other: rows
    start at words, fewer than 2^32 words apart, and consist of whole words. ALL: no tile goes beyond the tensor.
    The second reading of the tile finds it in the cache. Scales are given along the columns, if anywhere.
    """
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
    keys = round_keys(column_seed, STOCHASTIC)
    tensor = (encode, given, given_row, given_column)
    if WORDS:
        words = load_down(tile.to(tl.pointer_type(tl.int32), bitcast=True), stride // PER, limit, N, ALL)
        for c in range(PER):
            _quantize_column(column_of(words, c, N, TYPE), (column + c).to(tl.int64), tl.program_id(0), inside, height,
                             column_signs, keys, column_codes, column_scale_bytes, column_masks, column_site, tensor, N,
                             ROTATION, SIGNED, BLOCK, RULE, SIGMA, POWER, STOCHASTIC, TILE, MASK, SWIZZLED, HARDWARE)
    else:
        values = load_elements_down(tile, stride, limit, N)
        _quantize_column(values, column.to(tl.int64), tl.program_id(0), inside, height, column_signs, keys,
                         column_codes, column_scale_bytes, column_masks, column_site, tensor, N, ROTATION, SIGNED,
                         BLOCK, RULE, SIGMA, POWER, STOCHASTIC, TILE, MASK, SWIZZLED, HARDWARE)
    if ROWS:
        keys = round_keys(row_seed, RSR)
        ACROSS: tl.constexpr = L * PER // RN
        for turn in range((N * ACROSS + L - 1) // L):
            unit = turn * L + lane
            quantize_row_units(x, row_signs, keys, row_codes, row_scale_bytes, row_masks, first + unit // ACROSS,
                               tl.program_id(1) * ACROSS + unit % ACROSS, tl.minimum(rows, first + N), cols,
                               stride, (cols + RN - 1) // RN, row_site, (row_encode, None, 0, 0), RN, RR, RS, RB,
                               RRULE, RSIGMA, RPOWER, RSR, RTILE, RM, WIDE, SWIZZLED, RHW)


@triton.jit
def _quantize_column(values, row, unit, inside, height, signs, keys, code_words, scale_bytes, mask_words, site, tensor,
                     N: tl.constexpr, ROTATION: tl.constexpr, SIGNED: tl.constexpr, BLOCK: tl.constexpr,
                     RULE: tl.constexpr, SIGMA: tl.constexpr, POWER: tl.constexpr, STOCHASTIC: tl.constexpr,
                     TILE: tl.constexpr, MASK: tl.constexpr, SWIZZLED: tl.constexpr, HARDWARE: tl.constexpr):
    """Quantise and store N rows of one column a lane: a unit of ``row`` of a transpose ``height`` units wide."""
    packed, masks, scales = quantize_unit(values, signs, keys, site, row, unit, height, inside, tensor, N, ROTATION,
                                          SIGNED, BLOCK, RULE, SIGMA, POWER, STOCHASTIC, MASK, TILE, HARDWARE)
    store_unit(packed, masks, scales, code_words, scale_bytes, mask_words, row, unit, height, inside, N, BLOCK, MASK,
               TILE, SWIZZLED)


@triton.jit
def requantize_columns(code_words, scale_bytes, signs, seed, out_codes, out_scale_bytes, rows, words, site,
                       IN_BLOCK: tl.constexpr,
                       N: tl.constexpr, ROTATION: tl.constexpr, SIGNED: tl.constexpr, BLOCK: tl.constexpr,
                       RULE: tl.constexpr, SIGMA: tl.constexpr, POWER: tl.constexpr, STOCHASTIC: tl.constexpr,
                       TILE: tl.constexpr, HARDWARE: tl.constexpr, SWIZZLED: tl.constexpr, ALL: tl.constexpr,
                       B: tl.constexpr):
    """The eight columns of words j of N packed rows, dequantised, rotated and quantised along the rows; B words j.

    Matrices of so many rows lie below each other, as their transposes do. ALL: no tile goes beyond a matrix. SWIZZLED:
    scales are read and written where Blackwell's tensor cores look, of one matrix.
    """
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
    bytes_ = _scales_down(scale_bytes, first, j * 8 // IN_BLOCK, width * 8 // IN_BLOCK, limit, N, SWIZZLED, ALL)
    scales = ()
    for i in tl.static_range(N):
        # an infinite scale in place of NaN makes infinities or NaN of the block all the same
        scales = scales + (tl.maximum(bytes_[i] << 23, 1 << 22).to(tl.float32, bitcast=True),)
    if SIGNED:  # a row has one sign for all its columns
        scales = signed(scales, signs, N, ROTATION)
    keys = round_keys(seed, STOCHASTIC)
    for c in range(8):
        values = ()
        for i in tl.static_range(N):
            values = values + (value_of(nibbles[i] << (28 - 4 * c)) * scales[i],)
        _quantize_column(values, matrix * words * 8 + j * 8 + c, unit, inside, height, None, keys, out_codes,
                         out_scale_bytes, out_codes, site, (None, None, 0, 0), N, ROTATION, False, BLOCK, RULE, SIGMA,
                         POWER, STOCHASTIC, TILE, False, SWIZZLED, HARDWARE)


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
