"""Device functions of an E2M1/E8M0 block quantiser on thread-owned blocks; the formulas are the reference's.

What a Hopper multiprocessor issues is the limit: it starts half as many integer operations, minima and shifts a cycle
as fp32 additions and multiplications, so integers are made, packed and rounded in fp32 where that is exact.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quartet.kernels.reference.formats.scales import QUEST_CLIP, QUEST_FLOOR
from quartet.kernels.triton.memory import INTERPRETED, half_to_float, pair
from quartet.kernels.triton.quantize.blocks import amax_bits, scaled, squares, tree_sum

_CLIP = tl.constexpr(QUEST_CLIP)
_FLOOR = tl.constexpr(QUEST_FLOOR)
_ROUND = tl.constexpr(8388608.0)  # 2^23: x + 2^23 rounds 0 ≤ x < 2^23 to an integer, which is the sum's low bits
_ROUND_BITS = tl.constexpr(0x4B000000)
_HUGE = tl.constexpr((127 + 60) << 23)  # from there on squares are taken of x · 2^-96
_SAFE = tl.constexpr(2.0**100)  # a mean square below it has no such element
_SIX = tl.constexpr(6.0 * 2.0**-14)
_INFINITE = tl.constexpr(0x7F800000)


@triton.jit
def scale_byte(x, SPEC: tl.constexpr):
    """E8M0 bytes of blocks as ``SPEC`` has them, int32 ``[B]``."""
    N: tl.constexpr = SPEC.block
    if SPEC.rule == "quest":
        SIGMA: tl.constexpr = SPEC.sigma
        POWER: tl.constexpr = SPEC.power
        square, mean = _moments(x, N, SIGMA)
        byte = _power(tl.sqrt_rn(_variance(square, mean, SIGMA)) * _CLIP + _FLOOR, POWER)
        if tl.max(((square > 0.0) & (square < _SAFE)).to(tl.int32) ^ 1) != 0:  # some block is zero, tiny, huge or NaN
            top = amax_bits(x, N)
            huge = top >= _HUGE
            square, mean = _moments(scaled(x, tl.where(huge, 1.262177448353619e-29, 1.0), N), N, SIGMA)  # 2^-96
            up = tl.where(huge, 7.922816251426434e28, 1.0)
            target = tl.sqrt_rn(_variance(square, mean, SIGMA)) * _CLIP * up + _FLOOR
            byte = tl.where(top < _INFINITE, tl.where(top == 0, 127, tl.minimum(_power(target, POWER), 254)), 255)
        return byte
    else:
        RULE: tl.constexpr = SPEC.rule
        return byte_of_amax(amax_bits(x, N), RULE)


@triton.jit
def byte_of_amax(top, RULE: tl.constexpr):
    """E8M0 bytes by a rule that looks at the largest magnitude only, from its bits."""
    byte = (top >> 23) - 2
    if RULE == "ceil":
        byte += ((top & 0x7FFFFF) > 0x400000).to(tl.int32)
    elif RULE == "even":
        byte += ((top & 0x7FFFFF) >= 0x600000).to(tl.int32)
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
def grid_index(z, CLIPS: tl.constexpr):
    """Index 0…7 of min(|z|, 6) on the E2M1 grid, to nearest, as a float."""
    a = tl.abs(z)
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
def binade(x, LEAST: tl.constexpr):
    """The power of two in non-negative fp32, at least LEAST, which is one."""
    return tl.maximum((x.to(tl.int32, bitcast=True) & _INFINITE).to(tl.float32, bitcast=True), LEAST)


@triton.jit
def rounded(x, BITS: tl.constexpr, LEAST: tl.constexpr):
    """Non-negative fp32 to nearest even with BITS bits behind the first; below LEAST, a power of two, in its steps.

    The last bit of a difference with 2^(23 − BITS) · x is the last of those: that product's own last bit is 0 where x
    lies halfway, and just above a power of two, where the difference falls below the product's, x goes to it anyway.
    """
    LARGE: tl.constexpr = 2.0 ** (23 - BITS)
    like = tl.maximum(x, 1.5 * LEAST)
    return tl.fma(like, LARGE, tl.fma(like, -LARGE, x))


@triton.jit
def grid_value(z):
    """min(|z|, 6) on the E2M1 grid, to nearest."""
    return rounded(tl.minimum(tl.abs(z), 6.0), 1, 1.0)


@triton.jit
def value_pairs(v, N: tl.constexpr):
    """N/2 int32 vectors of the float16 of N values: elements 0 and 2, 1 and 3, and so on in each four."""
    pairs = ()
    for k in tl.static_range(N // 4):
        pairs = pairs + (pair(v[4 * k], v[4 * k + 2], tl.float16), pair(v[4 * k + 1], v[4 * k + 3], tl.float16))
    return pairs


@triton.jit
def codes_of_pairs(pairs, x, N: tl.constexpr):
    """N/8 int32 vectors of codes: magnitudes of :func:`value_pairs` on the grid, and the signs of ``x``."""
    packed = ()
    for w in tl.static_range(N // 8):
        packed = packed + (_magnitudes(pairs[4 * w], pairs[4 * w + 1], pairs[4 * w + 2], pairs[4 * w + 3])
                           | _signs(x[8 * w:8 * w + 8]),)
    return packed


@triton.jit
def _magnitudes(even0, odd0, even1, odd1):
    """int32 of eight codes without signs, of float16 values; bits 11…9 of a value times 2^-14 are its code."""
    if INTERPRETED:
        out = tl.zeros_like(even0)
        for k in tl.static_range(8):
            halves = (even0 if k < 4 else even1) if k % 2 == 0 else (odd0 if k < 4 else odd1)
            value = half_to_float(halves >> (16 * (k % 4 // 2)), tl.float16) * 2.0**-14
            out = out | ((value.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int32) >> 9) << (4 * k))
        return out
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, c;
            mov.b32 c, 0x04000400;
            mul.rn.f16x2 a, $2, c;
            shl.b32 a, a, 4;
            mul.rn.f16x2 b, $1, c;
            add.u32 a, a, b;
            mul.rn.f16x2 b, $4, c;
            shl.b32 b, b, 4;
            mul.rn.f16x2 c, $3, c;
            add.u32 b, b, c;
            prmt.b32 a, a, b, 0x7531;
            shr.u32 $0, a, 1;
            }""", "=r,r,r,r,r", [even0, odd0, even1, odd1], dtype=tl.int32, is_pure=True, pack=1)


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
            prmt.b32 a, $1, $3, 0x00FB;
            prmt.b32 b, $5, $7, 0xFB00;
            prmt.b32 a, a, b, 0x7610;
            prmt.b32 b, $2, $4, 0x00FB;
            prmt.b32 $0, $6, $8, 0xFB00;
            prmt.b32 b, b, $0, 0x7610;
            lop3.b32 a, a, b, 0x0F0F0F0F, 0xE4;
            and.b32 $0, a, 0x88888888;
            }""", "=&r,f,f,f,f,f,f,f,f", [z[0], z[1], z[2], z[3], z[4], z[5], z[6], z[7]], dtype=tl.int32,
            is_pure=True, pack=1)


@triton.jit
def _stochastic(z, word0, word1, CLIPS: tl.constexpr):
    """int32 of the codes of eight elements that are given times 2^-14, by two random words.

    The bits of float16(|z|) are 512 times the index, so that a draw 0…511 is added to them and bits 11…9 are the code:
    two elements at a time, those of even number by the words' bits from 0 and 16 on, the others from 7 and 23 on.
    """
    if INTERPRETED:
        out = tl.zeros_like(word0)
        for k in tl.static_range(8):
            a = tl.abs(z[k])
            if CLIPS:
                a = tl.minimum(a, _SIX)
            draw = ((word0 if k < 4 else word1) >> (7 * (k % 2) + 16 * (k % 4 // 2))) & 0x1FF
            index = ((a.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32) + draw) >> 9) & 7
            out = out | ((index | ((z[k].to(tl.uint32, bitcast=True) >> 28) & 8)) << (4 * k))
        return out.to(tl.int32, bitcast=True)
    else:
        even0, even1 = _halves(z[0], z[2], CLIPS), _halves(z[4], z[6], CLIPS)
        odd0, odd1 = _halves(z[1], z[3], CLIPS), _halves(z[5], z[7], CLIPS)
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 r, a, b, c, d;
            and.b32 r, $5, 0x01FF01FF;
            add.u32 a, $1, r;
            and.b32 r, $6, 0x01FF01FF;
            add.u32 b, $2, r;
            prmt.b32 a, a, b, 0x7531;
            shr.u32 r, $5, 7;
            and.b32 r, r, 0x01FF01FF;
            add.u32 c, $3, r;
            shr.u32 r, $6, 7;
            and.b32 r, r, 0x01FF01FF;
            add.u32 d, $4, r;
            prmt.b32 c, c, d, 0x7531;
            shr.u32 b, a, 1;
            shr.u32 a, a, 4;
            shl.b32 d, c, 3;
            and.b32 b, b, 0x07070707;
            and.b32 a, a, 0x08080808;
            and.b32 d, d, 0x70707070;
            and.b32 c, c, 0x80808080;
            or.b32 a, a, b;
            or.b32 c, c, d;
            or.b32 $0, a, c;
            }""", "=r,r,r,r,r,r,r", [even0, even1, odd0, odd1, word0, word1], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _halves(a, b, CLIPS: tl.constexpr):
    """int32 of two floats rounded to float16, ``a`` in the low half; with CLIPS to ±6 · 2^-14 at most."""
    if CLIPS:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 h, top;
            cvt.rn.f16x2.f32 h, $2, $1;
            mov.b32 top, 0x0E000E00;
            min.f16x2 h, h, top;
            mov.b32 top, 0x8E008E00;
            max.f16x2 $0, h, top;
            }""", "=r,f,f", [a, b], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return pair(a, b, tl.float16)


@triton.jit
def _converted(z):
    """int32 of the codes of eight elements, to nearest by the conversion that sm_100a, 103a, 120a and 121a have.

    Its first operand goes to the byte's high nibble. Ties go to the even code and what lies beyond ±6 to ±6, as in
    the reference.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b8 a, b, c, d;
        cvt.rn.satfinite.e2m1x2.f32 a, $2, $1;
        cvt.rn.satfinite.e2m1x2.f32 b, $4, $3;
        cvt.rn.satfinite.e2m1x2.f32 c, $6, $5;
        cvt.rn.satfinite.e2m1x2.f32 d, $8, $7;
        mov.b32 $0, {a, b, c, d};
        }""", "=r,f,f,f,f,f,f,f,f", [z[0], z[1], z[2], z[3], z[4], z[5], z[6], z[7]], dtype=tl.int32, is_pure=True,
        pack=1)


@triton.jit
def _converted_stochastically(z, word0, word1):
    """int32 of the codes of eight elements, at random by the conversion that only sm_100a and 103a have.

    The first of its four operands goes to the highest nibble. It takes a word's 32 bits for four elements, 16 for the
    two of each byte: the low bytes of the word's halves for the low byte, and the high bytes for the high one.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b16 a, b;
        cvt.rs.satfinite.e2m1x4.f32 a, {$4, $3, $2, $1}, $9;
        cvt.rs.satfinite.e2m1x4.f32 b, {$8, $7, $6, $5}, $10;
        mov.b32 $0, {a, b};
        }""", "=r,f,f,f,f,f,f,f,f,r,r", [z[0], z[1], z[2], z[3], z[4], z[5], z[6], z[7], word0, word1],
        dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _nibbles(x, inverse, words, STOCHASTIC: tl.constexpr, CLIPS: tl.constexpr, HARDWARE: tl.constexpr):
    """int32 of the codes of eight elements, the first in the low bits."""
    z = scaled(x, inverse, 8)
    if HARDWARE:
        if STOCHASTIC:
            return _converted_stochastically(z, words[0], words[1])
        else:
            return _converted(z)
    elif STOCHASTIC:
        return _stochastic(z, words[0], words[1], CLIPS)
    else:
        f = ()
        for k in tl.static_range(8):
            f = f + (grid_index(z[k], CLIPS),)
        return (_four(f[0], f[1], f[2], f[3]) & 0xFFFF) | (_four(f[4], f[5], f[6], f[7]) << 16) | _signs(z)


@triton.jit
def _not_clipped(x, inverse, LIMIT: tl.constexpr):
    """int32 of the bits |x · inverse| < LIMIT of 32 elements, the first in the low bit; NaN counts as clipped."""
    bits = tl.zeros_like(x[0]).to(tl.uint32)
    for k in tl.static_range(32):
        below = tl.abs(x[31 - k] * inverse) - LIMIT
        bits = (bits << 1) | (below.to(tl.uint32, bitcast=True) >> 31)
    return bits.to(tl.int32, bitcast=True)


@triton.jit
def round_keys(seed, STOCHASTIC: tl.constexpr):
    """Philox's two keys for each of ten rounds, of the seed at a pointer; nothing where nothing is drawn."""
    keys = ()
    if STOCHASTIC:
        value = tl.load(seed)
        low, high = value.to(tl.uint32), (value >> 32).to(tl.uint32)
        for i in tl.static_range(10):
            keys = keys + (low + tl.full((), i * 0x9E3779B9 % 2**32, tl.uint32),
                           high + tl.full((), i * 0xBB67AE85 % 2**32, tl.uint32))
    return keys


@triton.jit
def random_words(keys, site, group, N: tl.constexpr):
    """N/4 vectors of random words, of the groups of 16 elements from ``group`` (int64) on; see :func:`round_keys`."""
    words = ()
    high = (group >> 32).to(tl.uint32)
    for call in tl.static_range(N // 16):
        low = (group + call).to(tl.uint32)
        words = words + _philox(keys, low, high, tl.full(low.shape, site, tl.uint32))
    return words


@triton.jit
def _philox(keys, c0, c1, c2):
    """Philox4x32-10 of counters (c0, c1, c2, 0). Triton's own multiplies twice for the two halves of a product."""
    c3 = tl.zeros_like(c0)
    for i in tl.static_range(10):
        p0, p1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (p1 >> 32).to(tl.uint32) ^ c1 ^ keys[2 * i], (p0 >> 32).to(tl.uint32) ^ c3 ^ keys[2 * i + 1]
        c1, c3 = p1.to(tl.uint32), p0.to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def encode(x, inverse, words, N: tl.constexpr, BLOCK: tl.constexpr, STOCHASTIC: tl.constexpr, CLIPS: tl.constexpr,
           MASK: tl.constexpr, HARDWARE: tl.constexpr):
    """N/8 int32 vectors of eight nibbles each, and N/32 of the bits of |x · inverse| < 6 (none unless MASK).

    CLIPS: what lies above 6 has to be made 6 first. HARDWARE: round by the GPU's conversions, to nearest with the same
    result, stochastically with another use of the random words. ``inverse``: a tuple with the reciprocal scale of
    every block of BLOCK, times 2^-14 if STOCHASTIC and not HARDWARE. ``words``: see :func:`random_words`.
    """
    packed, masks = (), ()
    for w in tl.static_range(N // 8):
        packed = packed + (_nibbles(x[w * 8:w * 8 + 8], inverse[w * 8 // BLOCK], words[w * 2:w * 2 + 2], STOCHASTIC,
                                    CLIPS, HARDWARE),)
    if MASK:
        for w in tl.static_range(N // 32):
            masks = masks + (_not_clipped(x[w * 32:w * 32 + 32], inverse[w * 32 // BLOCK],
                                          _SIX if STOCHASTIC and not HARDWARE else 6.0),)
    return packed, masks
