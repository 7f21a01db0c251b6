"""Triton kernels along rows: hadamard → quantize → pack and fold; fold of packed rows; mask → inverse hadamard."""

from __future__ import annotations

import triton
import triton.language as tl

from quartet.kernels.triton.memory import (
    INTERPRETED,
    load2,
    load4,
    load_blocks,
    load_byte,
    load_elements_down,
    load_word,
    store2,
    store4,
    store_blocks,
    swizzled,
)
from quartet.kernels.triton.quantize.blocks import amax_bits, first_stages, hadamard, last_stage, last_stage_amax_bits
from quartet.kernels.triton.quantize.fold import is_zero, lookup, row_byte, row_scale_byte, store_folded
from quartet.kernels.triton.quantize.quantizer import (
    byte_of_amax,
    encode,
    power_of_two,
    random_words,
    reciprocal,
    round_keys,
    scale_byte,
)
from quartet.kernels.triton.quantize.two_level import e4m3_value, quantize_blocks, store_tile


@triton.jit
def quantize_unit(x, signs, keys, site, row, column, units, valid, tensor, CHAIN: tl.constexpr):
    """Nibble words, mask words and scale bytes of units ``column``, of ``units`` in a row (int64).

    ``keys``: see ``round_keys``. ``tensor``: what two-level scales, those of blocks of 16, take from the whole tensor;
    see ``quantize_blocks``. CHAIN: a ``ChainConstants``.
    """
    SPEC: tl.constexpr = CHAIN.spec
    N: tl.constexpr = CHAIN.unit
    ROTATION: tl.constexpr = CHAIN.rotation
    BLOCK: tl.constexpr = SPEC.block
    RULE: tl.constexpr = SPEC.rule
    STOCHASTIC: tl.constexpr = SPEC.stochastic
    MASK: tl.constexpr = SPEC.mask
    HARDWARE: tl.constexpr = CHAIN.hardware
    if BLOCK == 16:
        x = hadamard(x, signs, N, ROTATION, False)
        packed, scales = quantize_blocks(x, keys, site, row, column, units, valid, tensor, CHAIN)
        masks = ()
    else:
        scales, inverse = (), ()
        if ROTATION > 0 and RULE != "quest":
            x = first_stages(x, signs, N, ROTATION)
            for b in tl.static_range(N // BLOCK):
                top = last_stage_amax_bits(x[b * BLOCK:(b + 1) * BLOCK], BLOCK, ROTATION)
                scales = scales + (byte_of_amax(top, RULE),)
            x = last_stage(x, N, ROTATION)
        else:
            x = hadamard(x, signs, N, ROTATION, False)
            for b in tl.static_range(N // BLOCK):
                scales = scales + (scale_byte(x[b * BLOCK:(b + 1) * BLOCK], SPEC),)
        steps: tl.constexpr = 2.0**-14 if STOCHASTIC and not HARDWARE else 1.0
        factor: tl.constexpr = (0.75 if RULE == "headroom" else 1.0) * steps
        for b in tl.static_range(N // BLOCK):
            inverse = inverse + (reciprocal(scales[b]) * factor,)
        random = ()
        if STOCHASTIC:
            random = random_words(keys, site, (row * units + column) * (N // 16), N)
        # even leaves what is below 7, which rounds to 6 by itself where it rounds to nearest
        clips: tl.constexpr = RULE == "quest" or RULE == "floor" or (RULE == "even" and STOCHASTIC)
        packed, masks = encode(x, inverse, random, N, BLOCK, STOCHASTIC, clips, MASK, HARDWARE)
    return packed, masks, scales


@triton.jit
def store_unit(packed, masks, scales, out, row, column, units, valid, CHAIN: tl.constexpr):
    """Write what :func:`quantize_unit` made of unit ``column`` of the ``units`` of a row, which is int64.

    ``out``: where words of codes, bytes of scales, None if those are there already, and words of the mask go.
    """
    N: tl.constexpr = CHAIN.unit
    BLOCK: tl.constexpr = CHAIN.spec.block
    code_words, scale_bytes, mask_words = out
    unit = row * units + column
    if N == 16:
        store2(code_words + unit * 2, packed, valid)
    for w in tl.static_range(N // 32):
        store4(code_words + unit * (N // 8) + w * 4, packed[w * 4:w * 4 + 4], valid)
    if scale_bytes is not None:
        COUNT: tl.constexpr = N // BLOCK
        PER: tl.constexpr = 2 - COUNT % 2  # two neighbours at once are so in both layouts
        for b in tl.static_range(0, COUNT, PER):
            if CHAIN.swizzled:
                at = swizzled(row.to(tl.int32), column * COUNT + b, units * COUNT)
            else:
                at = unit * COUNT + b
            if CHAIN.spec.tile and not CHAIN.swizzled:
                for k in tl.static_range(PER):
                    store_tile(scale_bytes, scales[b + k], row, column * COUNT + b + k, units * COUNT, valid)
            elif PER == 2:
                tl.store((scale_bytes + at).to(tl.pointer_type(tl.int16), bitcast=True),
                         (scales[b] | (scales[b + 1] << 8)).to(tl.int16), mask=valid)
            else:
                tl.store(scale_bytes + at, scales[b].to(tl.uint8), mask=valid)
    if CHAIN.spec.mask:
        for w in tl.static_range(N // 32):
            tl.store(mask_words + unit * (N // 32) + w, masks[w], mask=valid)


@triton.jit
def quantize_rows(x, signs, seed, code_words, scale_bytes, mask_words, value_words, row_scales, inexact, lut,
                  rows, cols, row_stride, units, site, encode,
                  CHAIN: tl.constexpr, FOLD: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr, L: tl.constexpr):
    """R rows, L units of each: all of the row with FOLD, else L units from the second grid axis on. Tiles: R is 16.

    CHAIN: a ``ChainConstants``, without swizzled scales where FOLD is set.
    FOLD reads what the program has just written back from the cache, once the row's largest scale is known.
    """
    lane = tl.arange(0, R * L)
    row = tl.program_id(0).to(tl.int64) * R + lane // L
    keys = round_keys(seed, CHAIN.spec.stochastic)
    out = (code_words, scale_bytes, mask_words)
    tensor = (encode, None, 0, 0)
    if FOLD:
        top = tl.zeros_like(lane)
        for start in range(0, units, L):
            top = tl.maximum(top, quantize_row_units(x, signs, keys, out, row, start + lane % L, rows, cols, row_stride,
                                                     units, site, tensor, CHAIN, WIDE))
        tl.debug_barrier()
        packed = units * (CHAIN.unit // 32)
        _fold_units(code_words, scale_bytes, value_words, row_scales, inexact, lut, row, lane, top, rows, 0, packed,
                    packed, 1, CHAIN.spec.block // 32, R, L)
    else:
        quantize_row_units(x, signs, keys, out, row, tl.program_id(1) * L + lane % L, rows, cols, row_stride, units,
                           site, tensor, CHAIN, WIDE)


@triton.jit
def quantize_row_units(x, signs, keys, out, row, column, rows, cols, row_stride, units, site, tensor,
                       CHAIN: tl.constexpr, WIDE: tl.constexpr):
    """Quantise and store one unit a lane; returns the largest E8M0 byte of its blocks but for zero and NaN."""
    N: tl.constexpr = CHAIN.unit
    BLOCK: tl.constexpr = CHAIN.spec.block
    valid = (row < rows) & (column < units)
    values = load_blocks(x, row * row_stride + column * N, valid, cols - column * N, N, WIDE)
    packed, masks, scales = quantize_unit(values, signs, keys, site, row, column, units, valid, tensor, CHAIN)
    store_unit(packed, masks, scales, out, row, column, units, valid, CHAIN)
    top = tl.zeros_like(scales[0])
    if BLOCK > 16:
        for w in tl.static_range(N // 32):
            top = tl.maximum(top, row_byte(scales[w * 32 // BLOCK], is_zero(packed[w * 4:w * 4 + 4])))
    return tl.where(valid, top, 0)


@triton.jit
def fold_rows(code_words, scale_bytes, value_words, row_scales, inexact, lut, ends, rows, units, groups,
              PER_SCALE: tl.constexpr, GROUPED: tl.constexpr, R: tl.constexpr, L: tl.constexpr):
    """E4M3 bytes and row scales of packed rows of ``units`` · 32 elements; PER_SCALE · 32 elements share a scale.

    GROUPED: those of one group's part of the rows, which is the second grid axis, up to the last for the last group.
    """
    lane = tl.arange(0, R * L)
    row = tl.program_id(0).to(tl.int64) * R + lane // L
    first, last, group = 0, units, tl.program_id(1)
    if GROUPED:
        first = tl.load(ends + group - 1, mask=group > 0, other=0) // 32
        last = tl.where(group < groups - 1, tl.load(ends + group) // 32, units)
    top = tl.zeros_like(lane)
    for start in range(first, last, L):
        byte, words, _, _ = _packed_unit(code_words, scale_bytes, row, start + lane % L, rows, last, units, PER_SCALE)
        top = tl.maximum(top, row_byte(byte, is_zero(words)))
    _fold_units(code_words, scale_bytes, value_words, row_scales + group, inexact, lut, row, lane, top, rows, first,
                last, units, groups, PER_SCALE, R, L)


@triton.jit
def _fold_units(code_words, scale_bytes, value_words, row_scales, inexact, lut, row, lane, top, rows, first, last,
                units, groups, PER_SCALE: tl.constexpr, R: tl.constexpr, L: tl.constexpr):
    """Write the E4M3 bytes and scales of units ``first`` to ``last`` of rows of ``units`` · 32 packed elements, whose
    largest byte is in ``top``; scales of a row lie ``groups`` apart."""
    scale = row_scale_byte(tl.max(tl.reshape(top, (R, L)), 1))
    here = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    tl.store(row_scales + here * groups, power_of_two(scale), mask=here < rows)
    scale = tl.reshape(tl.broadcast_to(scale[:, None], (R, L)), (R * L,))
    lost = tl.zeros_like(lane)
    for start in range(first, last, L):
        byte, words, unit, valid = _packed_unit(code_words, scale_bytes, row, start + lane % L, rows, last, units,
                                                PER_SCALE)
        low, high, far = lookup(lut, byte, scale)
        lost += (far & ~is_zero(words)).to(tl.int32)
        store_folded(value_words + unit * 8, words, low, high, valid)
    total = tl.sum(lost)
    if total > 0:
        tl.atomic_add(inexact, total.to(tl.int64))


@triton.jit
def _packed_unit(code_words, scale_bytes, row, column, rows, last, units, PER_SCALE: tl.constexpr):
    """Scale byte, four words of nibbles, flat index and validity of one block of 32 a lane, before block ``last``."""
    valid = (row < rows) & (column < last)
    unit = row * units + column
    words = ()
    if INTERPRETED:
        for k in tl.static_range(4):
            words = words + (tl.load(code_words + unit * 4 + k, mask=valid, other=0),)
    else:
        raw = load4(code_words + unit * 4, valid)
        for k in tl.static_range(4):
            words = words + (raw[k].to(tl.int32, bitcast=True),)
    return load_byte(scale_bytes + unit // PER_SCALE, valid), words, unit, valid


@triton.jit
def unrotate_rows(x, mask_words, signs, out, rows, cols, row_stride, units, gain,
                  N: tl.constexpr, ROTATION: tl.constexpr, GAIN: tl.constexpr, WIDE: tl.constexpr, B: tl.constexpr):
    """``hadamard(mask · x · gain, inverse)`` of B units of N elements, the first ``cols`` of each row."""
    column = tl.program_id(1) * B + tl.arange(0, B)
    row = tl.program_id(0).to(tl.int64)
    valid = column < units
    values = load_blocks(x + row * row_stride, column * N, valid, tl.full((B,), N, tl.int32), N, WIDE)
    y = ()
    for w in tl.static_range(N // 32):
        bits = column
        if mask_words is not None:
            bits = load_word(mask_words + (row * units + column) * (N // 32) + w, valid)
        for i in tl.static_range(32):
            v = values[w * 32 + i]
            if GAIN:
                v = v * gain
            if mask_words is not None:
                v = tl.where((bits >> i) & 1 == 1, v, 0.0)
            y = y + (v,)
    y = hadamard(y, signs, N, ROTATION, True)
    store_blocks(out + row * cols, column * N, y, valid, cols - column * N, N, WIDE)


@triton.jit
def dequantize_rows(code_words, scale_bytes, out, blocks, PER_SCALE: tl.constexpr, B: tl.constexpr):
    """``code · 2^e`` of B blocks of 32."""
    block = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    byte, words, _, valid = _packed_unit(code_words, scale_bytes, tl.zeros_like(block), block, 1, blocks, blocks,
                                         PER_SCALE)
    scale = power_of_two(byte)
    values = ()
    for i in tl.static_range(32):
        values = values + (value_of(words[i // 8] << (28 - 4 * (i % 8))) * scale,)
    store_blocks(out, block * 32, values, valid, tl.full((B,), 32, tl.int32), 32, True)


@triton.jit
def dequantize_blocks(code_words, scale_bytes, out, rows, cols, units, N: tl.constexpr, TILE: tl.constexpr,
                      R: tl.constexpr, L: tl.constexpr):
    """``code · E4M3 scale`` of R rows, L units of N elements of each: 16, or 32 where that divides the row.

    TILE: a scale belongs to 16 rows.
    """
    lane = tl.arange(0, R * L)
    row = tl.program_id(0).to(tl.int64) * R + lane // L
    column = tl.program_id(1) * L + lane % L
    valid = (row < rows) & (column < units)
    values = ()
    for b in tl.static_range(N // 16):
        words = load2(code_words + (row * units + column) * (N // 8) + b * 2, valid)
        at = (row >> 4 if TILE else row) * (units * (N // 16)) + column * (N // 16) + b
        scale = e4m3_value(load_byte(scale_bytes + at, valid))
        for i in tl.static_range(16):
            values = values + (value_of(words[i // 8] << (28 - 4 * (i % 8))) * scale,)
    store_blocks(out + row * cols, column * N, values, valid, tl.full((R * L,), N, tl.int32), N, N == 32)


@triton.jit
def rotate_rows(x, signs, largest, out, rows, cols, row_stride, column_stride, units, N: tl.constexpr,
                ROTATION: tl.constexpr, STORE: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr, L: tl.constexpr):
    """Rotated rows into ``out`` if STORE, and the largest magnitude as the bits of fp32: int32, which starts at 0.

    A program takes R rows and L units of N elements of each, and then rows further down. WIDE: as in ``load_blocks``;
    else elements of a row may lie apart.
    """
    lane = tl.arange(0, R * L)
    column = tl.program_id(1) * L + lane % L
    top = tl.zeros_like(lane)
    for start in range(tl.program_id(0) * R, rows, tl.num_programs(0) * R):
        row = start + lane // L + tl.zeros_like(lane).to(tl.int64)
        valid = (row < rows) & (column < units)
        if WIDE:
            values = load_blocks(x, row * row_stride + column * N, valid, cols - column * N, N, WIDE)
        else:
            first = x + row * row_stride + (column * N).to(tl.int64) * column_stride
            values = load_elements_down(first, column_stride + row * 0, tl.where(valid, cols - column * N, 0), N)
        values = hadamard(values, signs, N, ROTATION, False)
        top = tl.maximum(top, tl.where(valid, amax_bits(values, N), 0))
        if STORE:
            store_blocks(out, (row * units + column) * N, values, valid, tl.full((R * L,), N, tl.int32), N, True)
    tl.atomic_max(largest, tl.max(top))


@triton.jit
def value_of(top_nibble):
    """fp32 of the E2M1 code in bits 31…28: moved to the float's sign and low exponent it is the value · 2^-126."""
    bits = (top_nibble >> 6) & -2118123520  # 0x81C00000: the sign, and the code as bits 24…22
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37
