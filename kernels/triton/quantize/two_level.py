"""Device functions of an NVFP4 quantiser: E2M1 in blocks of 16 under E4M3 scales, and a factor of the tensor.

The formulas are those of ``quartet.kernels.reference.formats.nvfp4``, whose quotients are IEEE's. ``multiplier`` is the
tensor's and ``inverse`` its reciprocal, both fp32; scale bytes are int32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quartet.kernels.reference.formats.nvfp4 import EDEN_CLIP
from quartet.kernels.triton.memory import INTERPRETED, after, load_blocks, load_byte
from quartet.kernels.triton.quantize.blocks import amax_bits, scaled, tree_sum
from quartet.kernels.triton.quantize.quantizer import (
    binade,
    codes_of_pairs,
    encode,
    grid_value,
    random_words,
    rounded,
    value_pairs,
)

_CLIP = tl.constexpr(EDEN_CLIP)
_LARGEST = tl.constexpr(3.4028234663852886e38)
_TOP, _LEAST = tl.constexpr(448.0), tl.constexpr(2.0**-6)  # of E4M3: the largest, and the smallest normal one
_NAN = tl.constexpr(127)


@triton.jit
def _e4m3(x):
    """Non-negative fp32 on the E4M3 grid, to nearest even, at most 448; NaN stays."""
    return rounded(tl.minimum(x, _TOP, propagate_nan=tl.PropagateNan.ALL), 3, _LEAST)


@triton.jit
def _e4m3_usual(x):
    """:func:`_e4m3` from 2^-6 to 448; see :func:`rounded`, of which nothing is left to guard."""
    return tl.fma(x, 1048576.0, tl.fma(x, -1048576.0, x))  # 2^20


@triton.jit
def _e4m3_byte(value):
    """int32 bytes of values of the E4M3 grid without a sign; 127 of NaN."""
    bits = (value * 7.52316384526264e-37).to(tl.uint32, bitcast=True)  # 2^-120
    return tl.minimum((bits >> 20).to(tl.int32), _NAN)


@triton.jit
def e4m3_value(byte):
    """fp32 of E4M3 bytes without a sign."""
    value = (byte << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    return tl.where(byte == _NAN, tl.full(byte.shape, 0x7FC00000, tl.int32).to(tl.float32, bitcast=True), value)


@triton.jit
def _e4m3_stochastic(x, draw):
    """E4M3 bytes of non-negative fp32, up or down by a draw of 0…511; see ``reference.nvfp4.e4m3_stochastic``.

    A byte has the exponent and the steps of an eighth of its power of two, in sum: eight steps are the next exponent.
    """
    capped = tl.minimum(x, _TOP)
    power = binade(capped, _LEAST).to(tl.int32, bitcast=True)
    reciprocal = ((254 << 23) - power).to(tl.float32, bitcast=True)
    fixed = tl.fma(capped * reciprocal, 8.0 * 512.0, 8388608.0).to(tl.int32, bitcast=True)  # + 2^23: the low bits
    byte = (power >> 20) + ((fixed + draw) >> 9) - ((121 << 3) + (0x4B000000 >> 9))
    return tl.where(x != x, _NAN, byte)


@triton.jit
def _reciprocal(x):
    """1 / x, to nearest."""
    if INTERPRETED:
        return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), x)
    else:
        return tl.inline_asm_elementwise("rcp.rn.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _reciprocal_usual(x):
    """:func:`_reciprocal` from 2^-126 to below 2^126: what ptxas makes of it for such numbers, after a look at them."""
    if INTERPRETED:
        return _reciprocal(x)
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 r, e;
            rcp.approx.ftz.f32 r, $1;
            fma.rn.f32 e, $1, r, 0fBF800000;
            neg.f32 e, e;
            fma.rn.f32 $0, r, e, r;
            }""", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _encoder(scale, inverse):
    """What multiplies the elements of a block with an fp32 scale."""
    return tl.minimum(_reciprocal(scale * inverse), _LARGEST)


@triton.jit
def _values(x, encoder, CLIPS: tl.constexpr):
    """Magnitudes of a block on the E2M1 grid under its encoder, to nearest; without CLIPS none may be 7 or more."""
    v = ()
    for i in tl.static_range(16):
        z = x[i] * encoder
        v = v + (grid_value(z) if CLIPS else rounded(tl.abs(z), 1, 1.0),)
    return v


@triton.jit
def _squared_error(x, v, scale, multiplier):
    error = ()
    for i in tl.static_range(16):
        e = tl.fma(v[i], scale, tl.abs(x[i]) * -multiplier)  # two bits times four: the product is exact
        error = error + (e * e,)
    return tree_sum(error, 16)


@triton.jit
def _four_six(x, multiplier, N: tl.constexpr):
    """Scale bytes, encoders and nibble words of blocks: the largest magnitude of each is mapped to 6, or to 4 where its
    squared error is smaller.

    Where both scales of all blocks of a program lie among E4M3's normal numbers, none of them is clipped. They are then
    at most 1/17 smaller than before they were rounded, so that no element is encoded as more than 6.375.
    """
    tops, least, most = (), None, None
    for b in tl.static_range(N // 16):
        top = amax_bits(x[b * 16:b * 16 + 16], 16)
        least, most = (tl.minimum(least, top), tl.maximum(most, top)) if b > 0 else (top, top)
        tops = tops + (top.to(tl.float32, bitcast=True),)
    usual = ((least.to(tl.float32, bitcast=True) * (multiplier * (1.0 / 6.0)) >= _LEAST)
             & (most.to(tl.float32, bitcast=True) * (multiplier * (1.0 / 4.0)) <= _TOP))
    # and what is divided by lies from 2^-6 · inverse to 448 · inverse
    if (tl.min(usual.to(tl.int32)) != 0) & (multiplier >= 2.0**-116) & (multiplier <= 2.0**119):
        scales, encoders, packed = _tried(x, tops, multiplier, _reciprocal_usual(multiplier), N, True)
    else:
        scales, encoders, packed = _tried(x, tops, multiplier, _reciprocal(multiplier), N, False)
    return scales, encoders, packed


@triton.jit
def _tried(x, tops, multiplier, inverse, N: tl.constexpr, USUAL: tl.constexpr):
    scales, encoders, packed = (), (), ()
    for b in tl.static_range(N // 16):
        block = x[b * 16:b * 16 + 16]
        factor = after(multiplier, encoders[b - 1]) if b > 0 else multiplier
        six, four = tops[b] * (factor * (1.0 / 6.0)), tops[b] * (factor * (1.0 / 4.0))
        if USUAL:
            six, four = _e4m3_usual(six), _e4m3_usual(four)
            six_encoder, four_encoder = _reciprocal_usual(six * inverse), _reciprocal_usual(four * inverse)
        else:
            six, four = _e4m3(six), _e4m3(four)
            six_encoder, four_encoder = _encoder(six, inverse), _encoder(four, inverse)
        six_values = _values(block, six_encoder, not USUAL)
        six_error = _squared_error(block, six_values, six, factor)
        six_pairs = value_pairs(six_values, 16)
        four_values = _values(block, after(four_encoder, six_error), not USUAL)
        better = _squared_error(block, four_values, four, factor) < six_error
        four_pairs = value_pairs(four_values, 16)
        pairs = ()
        for k in tl.static_range(8):
            pairs = pairs + (tl.where(better, four_pairs[k], six_pairs[k]),)
        scales = scales + (_e4m3_byte(tl.where(better, four, six)),)
        encoders = encoders + (tl.where(better, four_encoder, six_encoder),)
        packed = packed + codes_of_pairs(pairs, block, 16)
    return scales, encoders, packed


@triton.jit
def _lane_sum(x):
    """The sum of a vector's four neighbours, as ``tree_sum`` of them has it, of each four."""
    return tl.sum(tl.sum(tl.reshape(x, (x.shape[0] // 4, 2, 2)), 1), 1)


@triton.jit
def _group_sum(even, odd):
    """The sum of a group's eight blocks, two a lane, as ``tree_sum`` of them has it, for each of the four lanes."""
    total = _lane_sum(even) + _lane_sum(odd)
    return tl.reshape(tl.broadcast_to(total[:, None], (total.shape[0], 4)), even.shape)


@triton.jit
def _eden(x, keys, site, row, column, units, multiplier, inverse):
    """Scale bytes, encoders and nibble words of two blocks a lane; four lanes beside each other have a group."""
    scales, encoders, lengths, alongs, packed = (), (), (), (), ()
    for b in tl.static_range(2):
        block = x[b * 16:b * 16 + 16]
        top = amax_bits(block, 16).to(tl.float32, bitcast=True)
        factor = after(multiplier, alongs[b - 1]) if b > 0 else multiplier
        scale = _e4m3(top * (factor * (1.0 / _CLIP)))
        scale = tl.where(scale == 0.0, 1.0, scale)
        encoder = _encoder(scale, inverse)
        v = _values(block, encoder, True)
        length, along = (), ()
        for i in tl.static_range(16):
            a = tl.abs(block[i]) * factor
            length, along = length + (a * a,), along + (a * (v[i] * scale),)
        lengths, alongs = lengths + (tree_sum(length, 16),), alongs + (tree_sum(along, 16),)
        scales, encoders = scales + (scale,), encoders + (encoder,)
        packed = packed + codes_of_pairs(value_pairs(v, 16), block, 16)
    length, along = _group_sum(lengths[0], lengths[1]), _group_sum(alongs[0], alongs[1])
    ratio = tl.where(along == 0.0, 1.0, tl.div_rn(length, along))
    words = random_words(keys, site, row * ((units + 7) // 8) + (column >> 3), 16)
    word = tl.where(column & 4 == 0, tl.where(column & 2 == 0, words[0], words[1]),
                    tl.where(column & 2 == 0, words[2], words[3])) >> (16 * (column & 1)).to(tl.uint32)
    return (_e4m3_stochastic(scales[0] * ratio, (word & 0x1FF).to(tl.int32)),
            _e4m3_stochastic(scales[1] * ratio, ((word >> 7) & 0x1FF).to(tl.int32))), encoders, packed


@triton.jit
def quantize_blocks(x, keys, site, row, column, units, valid, tensor, CHAIN: tl.constexpr):
    """Nibble words and scale bytes of units of elements, rotated already.

    ``tensor``: a pointer to the multiplier, and one to given scale bytes of tiles with its two strides, or None: then
    lanes hold 16 whole rows of tiles. Under ``eden`` a unit has two blocks and lanes follow a row in fours.
    """
    SPEC: tl.constexpr = CHAIN.spec
    N: tl.constexpr = CHAIN.unit
    HARDWARE: tl.constexpr = CHAIN.hardware
    multiplier = tl.load(tensor[0])
    inverse = _reciprocal(multiplier)
    scales, encoders, packed = (), (), ()
    if SPEC.rule == "eden":
        scales, encoders, packed = _eden(x, keys, site, row, column, units, multiplier, inverse)
    elif SPEC.rule == "four_six":
        scales, encoders, packed = _four_six(x, multiplier, N)
    else:
        for b in tl.static_range(N // 16):
            block = x[b * 16:b * 16 + 16]
            if tensor[1] is not None:
                at = (row >> 4) * tensor[2] + (column * (N // 16) + b).to(tl.int64) * tensor[3]
                byte = load_byte(tensor[1] + at, valid)
                encoder = _encoder(e4m3_value(byte), inverse)
            else:
                top = _tile_top(block, valid) if SPEC.tile else amax_bits(block, 16)
                top = top.to(tl.float32, bitcast=True)
                scale = _e4m3(top * (multiplier * (1.0 / 6.0)))
                encoder = _encoder(scale, inverse)
                byte = _e4m3_byte(scale)
            scales, encoders = scales + (byte,), encoders + (encoder,)
    if HARDWARE or SPEC.rule == "amax":
        packed = _codes(x, encoders, keys, site, row, column, units, CHAIN)
    return packed, scales


@triton.jit
def _codes(x, encoders, keys, site, row, column, units, CHAIN: tl.constexpr):
    """Nibble words of blocks under their encoders."""
    N: tl.constexpr = CHAIN.unit
    HARDWARE: tl.constexpr = CHAIN.hardware
    DRAWS: tl.constexpr = CHAIN.spec.stochastic and CHAIN.spec.rule != "eden"
    z = ()
    for b in tl.static_range(N // 16):
        z = z + scaled(x[b * 16:b * 16 + 16], encoders[b], 16)
    words = ()
    if DRAWS:
        words = random_words(keys, site, (row * units + column) * (N // 16), N)
    # apart from the encoders, whose products with 2^-14 need not be exact
    factor = tl.full(x[0].shape, 2.0**-14 if DRAWS and not HARDWARE else 1.0, tl.float32)
    return encode(z, (factor,), words, N, N, DRAWS, True, False, HARDWARE)[0]


@triton.jit
def _tile_top(block, valid):
    """Bits of the largest magnitude of a tile, for each of its 16 lanes; others' lie between them."""
    B: tl.constexpr = valid.shape[0] // 16
    top = tl.max(tl.reshape(tl.where(valid, amax_bits(block, 16), 0), (16, B)), 0)
    return tl.reshape(tl.broadcast_to(top[None, :], (16, B)), valid.shape)


@triton.jit
def tile_scales(x, multiplier, out, rows, cols, row_stride, units, N: tl.constexpr, WIDE: tl.constexpr,
                B: tl.constexpr):
    """Scale bytes of tiles of 16 by 16, by the rule ``amax``: of 16 rows and B units of N elements of each."""
    lane = tl.arange(0, 16 * B)
    row = tl.program_id(0).to(tl.int64) * 16 + lane // B
    column = tl.program_id(1) * B + lane % B
    valid = (row < rows) & (column < units)
    values = load_blocks(x, row * row_stride + column * N, valid, cols - column * N, N, WIDE)
    factor = tl.load(multiplier) * (1.0 / 6.0)
    for b in tl.static_range(N // 16):
        top = _tile_top(values[b * 16:b * 16 + 16], valid).to(tl.float32, bitcast=True)
        store_tile(out, _e4m3_byte(_e4m3(top * factor)), row, column * (N // 16) + b, units * (N // 16), valid)


@triton.jit
def store_tile(out, byte, row, column, columns, valid):
    """Write the scale bytes of tiles from the lanes with their first rows."""
    tl.store(out + (row >> 4) * columns + column, byte.to(tl.uint8), mask=valid & (row & 15 == 0))
