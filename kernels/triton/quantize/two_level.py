"""Device functions of an NVFP4 quantiser: E2M1 in blocks of 16 under E4M3 scales, and a factor of the tensor.

The formulas are those of ``quartet.kernels.reference.formats.nvfp4``, whose quotients are IEEE's. ``encode`` is the
tensor's multiplier and ``inverse`` its reciprocal, both fp32; scale bytes are int32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quartet.kernels.reference.formats.nvfp4 import EDEN_CLIP
from quartet.kernels.triton.memory import load_byte
from quartet.kernels.triton.quantize.blocks import amax_bits, scaled, tree_sum
from quartet.kernels.triton.quantize.quantizer import encode as encode_blocks
from quartet.kernels.triton.quantize.quantizer import grid_index, random_words

BLOCK = tl.constexpr(16)
_CLIP = tl.constexpr(EDEN_CLIP)
_LARGEST = tl.constexpr(3.4028234663852886e38)
_TOP = tl.constexpr(448.0)
_NAN = tl.constexpr(127)


@triton.jit
def e4m3_byte(x):
    """E4M3 bytes of non-negative fp32, to nearest even, at most 448; 127 of NaN."""
    capped = tl.minimum(x, _TOP)
    bits = capped.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    small = (capped + 16384.0).to(tl.int32, bitcast=True) - 0x46800000  # 2^14, whose spacing is E4M3's below 2^-6
    return tl.where(x != x, _NAN, tl.where(capped < 0.015625, small, normal))


@triton.jit
def e4m3_value(byte):
    """fp32 of E4M3 bytes without a sign."""
    value = (byte << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    return tl.where(byte == _NAN, tl.full(byte.shape, 0x7FC00000, tl.int32).to(tl.float32, bitcast=True), value)


@triton.jit
def _e4m3_stochastic(x, draw):
    """E4M3 bytes of non-negative fp32, up or down by a draw of 0…511; see ``reference.nvfp4.e4m3_stochastic``."""
    capped = tl.minimum(x, _TOP)
    exponent = tl.maximum(capped.to(tl.int32, bitcast=True) >> 23, 127 - 6)
    spacing = ((exponent - 3) << 23).to(tl.float32, bitcast=True)
    steps = ((257 - exponent) << 23).to(tl.float32, bitcast=True) * capped * 512.0
    steps = (steps + 8388608.0) - 8388608.0
    down = tl.floor((steps + draw.to(tl.float32)) * (1.0 / 512.0))
    return e4m3_byte(tl.where(x != x, x, tl.minimum(down * spacing, _TOP)))


@triton.jit
def _encoder(scale, inverse):
    """What multiplies the elements of a block with an fp32 scale."""
    return tl.minimum(tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale * inverse), _LARGEST)


@triton.jit
def _magnitude(x, encoder):
    """|value| on the E2M1 grid of one element under its block's encoder, to nearest."""
    i = grid_index(x * encoder, True)
    return tl.maximum(tl.maximum(i * 0.5, i - 2.0), i * 2.0 - 8.0)


@triton.jit
def _squared_error(x, encode, scale, encoder):
    error = ()
    for i in tl.static_range(16):
        e = _magnitude(x[i], encoder) * scale - tl.abs(x[i]) * encode
        error = error + (e * e,)
    return tree_sum(error, 16)


@triton.jit
def _four_six(x, top, encode, inverse):
    """The scale bytes that map a block's largest magnitude to 6, or to 4 where its squared error is smaller."""
    six, four = e4m3_byte(top * (encode * (1.0 / 6.0))), e4m3_byte(top * (encode * (1.0 / 4.0)))
    six_scale, four_scale = e4m3_value(six), e4m3_value(four)
    better = (_squared_error(x, encode, four_scale, _encoder(four_scale, inverse))
              < _squared_error(x, encode, six_scale, _encoder(six_scale, inverse)))
    return tl.where(better, four, six)


@triton.jit
def _group_sum(x):
    """The sum of a vector's eight neighbours, as ``tree_sum`` of them has it, for each of the eight."""
    G: tl.constexpr = x.shape[0] // 8
    total = tl.sum(tl.reshape(tl.sum(tl.reshape(tl.sum(tl.reshape(x, (G, 2, 4)), 1), (G, 2, 2)), 1), (G, 2)), 1)
    return tl.reshape(tl.broadcast_to(total[:, None], (G, 8)), x.shape)


@triton.jit
def _eden(x, top, keys, site, row, column, units, encode, inverse):
    """Scale byte and encoder of one block a lane; eight lanes beside each other have a group."""
    scale = e4m3_value(e4m3_byte(top * (encode * (1.0 / _CLIP))))
    scale = tl.where(scale == 0.0, 1.0, scale)
    encoder = _encoder(scale, inverse)
    length, along = (), ()
    for i in tl.static_range(16):
        a = tl.abs(x[i]) * encode
        length = length + (a * a,)
        along = along + (a * (_magnitude(x[i], encoder) * scale),)
    length, along = _group_sum(tree_sum(length, 16)), _group_sum(tree_sum(along, 16))
    ratio = tl.where(along == 0.0, 1.0, tl.div_rn(length, along))
    words = random_words(keys, site, row * ((units + 15) // 16) + (column >> 4), 16)
    word = tl.where(column & 8 == 0, tl.where(column & 4 == 0, words[0], words[1]),
                    tl.where(column & 4 == 0, words[2], words[3]))
    draw = (word >> (7 * (column & 1) + 8 * (column & 2)).to(tl.uint32)) & 0x1FF
    return _e4m3_stochastic(scale * ratio, draw), encoder


@triton.jit
def quantize_blocks(x, keys, site, row, column, units, valid, tensor, CHAIN: tl.constexpr):
    """Nibble words and scale bytes of units of elements, rotated already.

    ``tensor``: a pointer to the multiplier, and one to scale bytes with its two strides, whose blocks are of 16 rows
    each; tiles take those instead of any others. Under ``eden`` a unit is a block and lanes follow a row in eights.
    """
    SPEC: tl.constexpr = CHAIN.spec
    N: tl.constexpr = CHAIN.unit
    HARDWARE: tl.constexpr = CHAIN.hardware
    multiplier = tl.load(tensor[0])
    inverse = tl.div_rn(tl.full(multiplier.shape, 1.0, tl.float32), multiplier)
    scales, encoders = (), ()
    for b in tl.static_range(N // 16):
        block = x[b * 16:b * 16 + 16]
        top = amax_bits(block, 16).to(tl.float32, bitcast=True)
        if SPEC.rule == "eden":
            byte, encoder = _eden(block, top, keys, site, row, column, units, multiplier, inverse)
        else:
            if SPEC.tile:
                at = (row >> 4) * tensor[2] + (column * (N // 16) + b).to(tl.int64) * tensor[3]
                byte = load_byte(tensor[1] + at, valid)
            elif SPEC.rule == "four_six":
                byte = _four_six(block, top, multiplier, inverse)
            else:
                byte = e4m3_byte(top * (multiplier * (1.0 / 6.0)))
            encoder = _encoder(e4m3_value(byte), inverse)
        scales, encoders = scales + (byte,), encoders + (encoder,)
    z = ()
    for b in tl.static_range(N // 16):
        z = z + scaled(x[b * 16:b * 16 + 16], encoders[b], 16)
    DRAWS: tl.constexpr = SPEC.stochastic and SPEC.rule != "eden"
    words = ()
    if DRAWS:
        words = random_words(keys, site, (row * units + column) * (N // 16), N)
    # apart from the encoders, whose products with 2^-14 need not be exact
    factor = tl.full(x[0].shape, 2.0**-14 if DRAWS and not HARDWARE else 1.0, tl.float32)
    packed, _ = encode_blocks(z, (factor,), words, N, N, DRAWS, True, False, HARDWARE)
    return packed, scales


@triton.jit
def tile_scales(x, encode, out, rows, cols, row_stride, columns, B: tl.constexpr):
    """Scale bytes of B tiles of 16 by 16 beside each other, by the rule ``amax``; ``columns``: tiles of a row."""
    down, across = tl.arange(0, 16), tl.arange(0, 16 * B)
    row = tl.program_id(0).to(tl.int64) * 16 + down
    column = tl.program_id(1).to(tl.int64) * (16 * B) + across
    inside = (row < rows)[:, None] & (column < cols)[None, :]
    x = tl.load(x + row[:, None] * row_stride + column[None, :], mask=inside, other=0.0)
    bits = tl.max(x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    top = tl.max(tl.reshape(bits, (B, 16)), 1).to(tl.float32, bitcast=True)
    byte = e4m3_byte(top * (tl.load(encode) * (1.0 / 6.0)))
    tile = tl.program_id(1) * B + tl.arange(0, B)
    tl.store(out + tl.program_id(0).to(tl.int64) * columns + tile, byte.to(tl.uint8), mask=tile < columns)
