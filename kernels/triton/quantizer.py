"""Device functions of an E2M1/E8M0 block quantiser on thread-owned blocks; the formulas are the reference's.

What a Hopper multiprocessor issues is the limit: it starts half as many integer operations, minima and shifts a cycle
as fp32 additions and multiplications, so integers are made, packed and rounded in fp32 where that is exact.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quartet.kernels.reference.scales import QUEST_CLIP, QUEST_FLOOR
from quartet.kernels.triton.blocks import all_zero, amax_bits, scaled, squares, tree_sum
from quartet.kernels.triton.memory import INTERPRETED

_CLIP = tl.constexpr(QUEST_CLIP)
_FLOOR = tl.constexpr(QUEST_FLOOR)
_ROUND = tl.constexpr(8388608.0)  # 2^23: x + 2^23 rounds 0 ≤ x < 2^23 to an integer, which is the sum's low bits
_ROUND_BITS = tl.constexpr(0x4B000000)
_HUGE = tl.constexpr((127 + 60) << 23)  # from there on squares are taken of x · 2^-96
_SAFE = tl.constexpr(2.0**100)  # a mean square below it has no such element
_INFINITE = tl.constexpr(0x7F800000)


@triton.jit
def scale_byte(x, N: tl.constexpr, RULE: tl.constexpr, SIGMA: tl.constexpr, POWER: tl.constexpr):
    """E8M0 bytes of blocks of N, int32 ``[B]``."""
    if RULE == "quest":
        square, mean = _moments(x, N, SIGMA)
        byte = _power(tl.sqrt_rn(_variance(square, mean, SIGMA)) * _CLIP + _FLOOR, POWER)
        byte = tl.where(all_zero(x, N), 127, byte)
        if tl.max((square < _SAFE).to(tl.int32) ^ 1) != 0:
            top = amax_bits(x, N)
            huge = top >= _HUGE
            square, mean = _moments(scaled(x, tl.where(huge, 1.262177448353619e-29, 1.0), N), N, SIGMA)  # 2^-96
            up = tl.where(huge, 7.922816251426434e28, 1.0)
            target = tl.sqrt_rn(_variance(square, mean, SIGMA)) * _CLIP * up + _FLOOR
            byte = tl.where(top < _INFINITE, tl.where(top == 0, 127, tl.minimum(_power(target, POWER), 254)), 255)
        return byte
    else:
        top = amax_bits(x, N)
        byte = (top >> 23) - 2
        if RULE == "ceil":
            byte += ((top & 0x7FFFFF) > 0x400000).to(tl.int32)
        byte = tl.where(top == 0, 127, tl.maximum(byte, 0))
        return tl.where(top < _INFINITE, byte, 255)


@triton.jit
def _moments(x, N: tl.constexpr, SIGMA: tl.constexpr):
    square = tree_sum(squares(x, N), N) * (1.0 / N)
    mean = square
    if SIGMA != "rms":
        mean = tree_sum(x, N) * (1.0 / N)
    return square, mean


@triton.jit
def _variance(square, mean, SIGMA: tl.constexpr):
    if SIGMA == "rms":
        return square
    elif SIGMA == "guarded":
        return tl.maximum(square - mean * mean, square * 0.0625)
    else:
        return tl.maximum(square - mean * mean, 0.0)


@triton.jit
def _power(target, POWER: tl.constexpr):
    bits = target.to(tl.int32, bitcast=True)
    byte = bits >> 23
    if POWER == "nearest":
        byte += ((bits & 0x7FFFFF) >= 0x3504F4).to(tl.int32)
    return byte


@triton.jit
def power_of_two(byte):
    """2^(byte − 127) in fp32; 255 is NaN, 0 the subnormal 2^-127."""
    return tl.where(byte == 255, 0x7FC00000, tl.maximum(byte << 23, 1 << 22)).to(tl.float32, bitcast=True)


@triton.jit
def reciprocal(byte):
    """2^(127 − byte) in fp32, NaN for 255."""
    return power_of_two(tl.where(byte == 255, 255, 254 - byte))


@triton.jit
def _add_down(x, y):
    """``x + y`` rounded toward −∞."""
    if INTERPRETED:
        return tl.floor(x) + y
    else:
        return tl.inline_asm_elementwise("add.rm.f32 $0, $1, $2;", "=f,f,f", [x, tl.full(x.shape, y, tl.float32)],
                                         dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _uniform(word, K: tl.constexpr):
    """(r + ½)/256 of byte K of a random word, without a rounding."""
    if INTERPRETED:
        bits = ((word >> (8 * K)) & 0xFF) | _ROUND_BITS
    else:  # 2^23 + r has r as its low bits
        bits = tl.inline_asm_elementwise("prmt.b32 $0, $1, 0x4B000000, $2;", "=r,r,r",
                                         [word, tl.full(word.shape, 0x7440 + K, tl.uint32)], dtype=tl.uint32,
                                         is_pure=True, pack=1)
    return tl.fma(bits.to(tl.float32, bitcast=True), 0.00390625, -32767.998046875)


@triton.jit
def _index(z, u, STOCHASTIC: tl.constexpr, CLIPS: tl.constexpr):
    """Index 0…7 of min(|z|, 6) on the E2M1 grid, as a float."""
    a = tl.abs(z)
    if STOCHASTIC:
        near = _add_down(tl.fma(a, 2.0, u), _ROUND)
        middle = _add_down(a + u, _ROUND + 2.0)
        far = _add_down(tl.fma(a, 0.5, u), _ROUND + 4.0)
    else:
        near = tl.fma(a, 2.0, _ROUND)
        middle = a + (_ROUND + 2.0)
        far = tl.fma(a, 0.5, _ROUND + 4.0)
    # positive floats are in the order of their bits, and integers have a minimum of three
    low = tl.minimum(tl.minimum(near.to(tl.int32, bitcast=True), middle.to(tl.int32, bitcast=True)),
                     far.to(tl.int32, bitcast=True))
    if CLIPS:
        low = tl.minimum(low, _ROUND_BITS + 7)
    return low.to(tl.float32, bitcast=True) - _ROUND


@triton.jit
def _four(f0, f1, f2, f3):
    """Bits of 2^23 + f0 + 16 f1 + 256 f2 + 4096 f3."""
    return (tl.fma(tl.fma(f3, 16.0, f2), 256.0, tl.fma(f1, 16.0, f0)) + _ROUND).to(tl.int32, bitcast=True)


@triton.jit
def _signs(z):
    """int32 with the signs of eight floats in bits 3, 7, 11, …, 31."""
    if INTERPRETED:
        out = tl.zeros_like(z[0]).to(tl.uint32)
        for k in tl.static_range(8):
            out = out | ((z[k].to(tl.uint32, bitcast=True) >> (28 - 4 * k)) & (8 << 4 * k))
        return out.to(tl.int32, bitcast=True)
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b;
            prmt.b32 a, $1, $3, 0x0073;
            prmt.b32 b, $5, $7, 0x0073;
            prmt.b32 a, a, b, 0x5410;
            shr.u32 a, a, 4;
            and.b32 a, a, 0x08080808;
            prmt.b32 b, $2, $4, 0x0073;
            prmt.b32 $0, $6, $8, 0x0073;
            prmt.b32 b, b, $0, 0x5410;
            and.b32 b, b, 0x80808080;
            or.b32 $0, a, b;
            }""", "=&r,f,f,f,f,f,f,f,f", [z[0], z[1], z[2], z[3], z[4], z[5], z[6], z[7]], dtype=tl.int32,
            is_pure=True, pack=1)


@triton.jit
def _nibbles(x, inverse, words, STOCHASTIC: tl.constexpr, CLIPS: tl.constexpr):
    """int32 of the codes of eight elements, the first in the low bits."""
    z, f = (), ()
    for k in tl.static_range(8):
        z = z + (x[k] * inverse,)
        u = inverse
        if STOCHASTIC:
            u = _uniform(words[k // 4], k % 4)
        f = f + (_index(z[k], u, STOCHASTIC, CLIPS),)
    return (_four(f[0], f[1], f[2], f[3]) & 0xFFFF) | (_four(f[4], f[5], f[6], f[7]) << 16) | _signs(z)


@triton.jit
def _not_clipped(x, inverse):
    """int32 of the bits |x · inverse| < 6 of 32 elements, the first in the low bit; NaN counts as clipped."""
    bits = tl.zeros_like(x[0]).to(tl.uint32)
    for k in tl.static_range(32):
        below = tl.abs(x[31 - k] * inverse) - 6.0
        bits = (bits << 1) | (below.to(tl.uint32, bitcast=True) >> 31)
    return bits.to(tl.int32, bitcast=True)


@triton.jit
def random_words(seed, site, group, N: tl.constexpr):
    """N/4 vectors of four random bytes each, of the groups of 16 elements from ``group`` (int64) on."""
    words = ()
    high = (group >> 32).to(tl.uint32)
    for call in tl.static_range(N // 16):
        low = (group + call).to(tl.uint32)
        words = words + tl.philox(seed, low, high, tl.full(low.shape, site, tl.uint32), tl.zeros_like(low))
    return words


@triton.jit
def encode(x, inverse, words, N: tl.constexpr, BLOCK: tl.constexpr, STOCHASTIC: tl.constexpr, CLIPS: tl.constexpr,
           MASK: tl.constexpr):
    """N/8 int32 vectors of eight nibbles each, and N/32 of the bits of |x · inverse| < 6 (none unless MASK).

    CLIPS: the scale rule leaves elements above 6. ``inverse``: a tuple with the reciprocal scale of every block of
    BLOCK. ``words``: see :func:`random_words`.
    """
    packed, masks = (), ()
    for w in tl.static_range(N // 8):
        packed = packed + (_nibbles(x[w * 8:w * 8 + 8], inverse[w * 8 // BLOCK], words[w * 2:w * 2 + 2], STOCHASTIC,
                                    CLIPS),)
    if MASK:
        for w in tl.static_range(N // 32):
            masks = masks + (_not_clipped(x[w * 32:w * 32 + 32], inverse[w * 32 // BLOCK]),)
    return packed, masks
