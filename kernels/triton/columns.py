"""Triton kernels along columns: the quantiser of the transpose, from the tensor or from its packed codes."""

from __future__ import annotations

import triton
import triton.language as tl

from quartet.kernels.triton.memory import load_blocks, load_byte, load_element, load_word
from quartet.kernels.triton.rows import quantize_unit, store_unit, value_of


@triton.jit
def quantize_both(x, rows, cols, row_stride,
                  row_signs, row_seed, row_codes, row_scale_bytes, row_masks, row_site,
                  column_signs, column_seed, column_codes, column_scale_bytes, column_masks, column_site,
                  ROWS: tl.constexpr, RN: tl.constexpr, RR: tl.constexpr, RS: tl.constexpr, RB: tl.constexpr,
                  RRULE: tl.constexpr, RSIGMA: tl.constexpr, RPOWER: tl.constexpr, RSR: tl.constexpr, RM: tl.constexpr,
                  N: tl.constexpr, ROTATION: tl.constexpr, SIGNED: tl.constexpr, BLOCK: tl.constexpr,
                  RULE: tl.constexpr, SIGMA: tl.constexpr, POWER: tl.constexpr, STOCHASTIC: tl.constexpr,
                  MASK: tl.constexpr, WIDE: tl.constexpr, B: tl.constexpr):
    """A tile of N rows and B columns, quantised along its columns and, with ROWS, along its rows too.

    The second reading of the tile finds it in the cache.
    """
    first = tl.program_id(0).to(tl.int64) * N
    column = tl.program_id(1) * B + tl.arange(0, B)
    inside = column < cols
    left = rows - first + tl.zeros_like(column)
    stride = row_stride + first * 0  # 64 bits: rows may lie far apart
    tile = x + first * stride
    values = ()
    for i in tl.static_range(N):
        values = values + (load_element(tile + i * stride + column, inside & (i < left)),)
    height = (rows + N - 1) // N
    unit = column.to(tl.int64) * height + tl.program_id(0)
    packed, masks, scales = quantize_unit(values, column_signs, column_seed, column_site, unit * (N // 16), N, ROTATION,
                                          SIGNED, BLOCK, RULE, SIGMA, POWER, STOCHASTIC, MASK)
    store_unit(packed, masks, scales, column_codes, column_scale_bytes, column_masks, unit, inside, N, BLOCK, MASK)
    if ROWS:
        units = (cols + RN - 1) // RN
        lane = tl.arange(0, N * (B // RN))
        row = lane // (B // RN)
        across = tl.program_id(1) * (B // RN) + lane % (B // RN)
        valid = (first + row < rows) & (across < units)
        values = load_blocks(tile, row * stride + across * RN, valid, cols - across * RN, RN, WIDE)
        unit = (first + row) * units + across
        packed, masks, scales = quantize_unit(values, row_signs, row_seed, row_site, unit * (RN // 16), RN, RR, RS, RB,
                                              RRULE, RSIGMA, RPOWER, RSR, RM)
        store_unit(packed, masks, scales, row_codes, row_scale_bytes, row_masks, unit, valid, RN, RB, RM)


@triton.jit
def requantize_columns(code_words, scale_bytes, signs, seed, out_codes, out_scale_bytes, rows, words, site,
                       IN_BLOCK: tl.constexpr,
                       N: tl.constexpr, ROTATION: tl.constexpr, SIGNED: tl.constexpr, BLOCK: tl.constexpr,
                       RULE: tl.constexpr, SIGMA: tl.constexpr, POWER: tl.constexpr, STOCHASTIC: tl.constexpr,
                       B: tl.constexpr):
    """The eight columns of words j of N packed rows, dequantised, rotated and quantised along the rows; B words j."""
    first = tl.program_id(0).to(tl.int64) * N
    j = tl.program_id(1) * B + tl.arange(0, B)
    inside = j < words
    left = rows - first + tl.zeros_like(j)
    width = words + first * 0
    codes = code_words + first * width + j
    scale_row = width * 8 // IN_BLOCK
    bytes_ = scale_bytes + first * scale_row + j * 8 // IN_BLOCK
    nibbles, scales = (), ()
    for i in tl.static_range(N):
        ok = inside & (i < left)
        nibbles = nibbles + (load_word(codes + i * width, ok),)
        # an infinite scale in place of NaN makes infinities or NaN of the block all the same
        scale = tl.maximum(load_byte(bytes_ + i * scale_row, ok) << 23, 1 << 22).to(tl.float32, bitcast=True)
        scales = scales + (scale,)
    height = (rows + N - 1) // N
    for c in range(8):
        values = ()
        for i in tl.static_range(N):
            values = values + (value_of(nibbles[i] << (28 - 4 * c)) * scales[i],)
        unit = (j * 8 + c).to(tl.int64) * height + tl.program_id(0)
        packed, masks, made = quantize_unit(values, signs, seed, site, unit * (N // 16), N, ROTATION, SIGNED, BLOCK,
                                            RULE, SIGMA, POWER, STOCHASTIC, False)
        store_unit(packed, masks, made, out_codes, out_scale_bytes, out_codes, unit, inside, N, BLOCK, False)
