"""Device functions of scales by the largest magnitude, for elements of one byte; the formulas are the reference's."""

from __future__ import annotations

import triton
import triton.language as tl

from quartet.kernels.reference.formats.scales import _LARGEST_MULTIPLIER, _SIGN_AND_EXPONENT
from quartet.kernels.triton.quantize.quantizer import reciprocal

_INFINITE = tl.constexpr(0x7F800000)
_NAN = tl.constexpr(0x7FC00000)
_ONE = tl.constexpr(127 << 23)
_HIGHEST = tl.constexpr(253)  # exponent of the largest multiplier, 2^126
_LIMIT = tl.constexpr(_LARGEST_MULTIPLIER)
_POWER = tl.constexpr(_SIGN_AND_EXPONENT)


@triton.jit
def magnitude(x):
    """Bits of |x|: in the order of the numbers, with infinity and NaN on top."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def magnitude_of_four(tiles):
    """Bits of the largest magnitude of four."""
    return tl.maximum(tl.maximum(magnitude(tiles[0]), magnitude(tiles[1])),
                      tl.maximum(magnitude(tiles[2]), magnitude(tiles[3])))


@triton.jit
def multiplier_of(top, MAX: tl.constexpr, POW2: tl.constexpr):
    """``reference.scales.fp32_scale`` of the bits of the largest magnitudes, by division."""
    amax = top.to(tl.float32, bitcast=True)
    multiplier = tl.minimum(tl.div_rn(tl.full(top.shape, MAX, tl.float32), amax), _LIMIT)
    if POW2:
        multiplier = (multiplier.to(tl.int32, bitcast=True) & _POWER).to(tl.float32, bitcast=True)
    return tl.where(top < _INFINITE, tl.where(top == 0, 1.0, multiplier), float("nan"))


@triton.constexpr_function
def exponent_of(value):
    """⌊log2 value⌋ of at least 1."""
    return int(value).bit_length() - 1


@triton.constexpr_function
def carry(spec):
    """What, added to the bits of a magnitude above max · 2^k, moves it to the next exponent, and others not; 0 under
    the rule ``floor``, which does not ask."""
    significand = spec.max / 2.0 ** exponent_of(spec.max)
    return 0 if spec.rule == "floor" else 0x7FFFFF - int((significand - 1.0) * 2**23)


@triton.jit
def scales_of(top, SPEC: tl.constexpr):
    """fp32 by which elements are multiplied, and the scale as it is stored, of the bits of the largest magnitudes.

    Powers of two are made of exponents. 2^⌊log2(max / a)⌋ is also what rounding the quotient first gives: for an ``a``
    just above max · 2^k it is at most 1 − 2^-24 times a power of two, which is an fp32 number.
    """
    if SPEC.scale == "e8m0":
        byte = ((top + carry(SPEC)) >> 23) - exponent_of(SPEC.max)
        byte = tl.where(top < _INFINITE, tl.where(top == 0, 127, tl.maximum(byte, 0)), 255)
        return reciprocal(byte), byte.to(tl.uint8)
    elif SPEC.rule == "amax_pow2":
        exponent = tl.minimum(254 + exponent_of(SPEC.max) - ((top + carry(SPEC)) >> 23), _HIGHEST)
        bits = tl.where(top == 0, _ONE, exponent << 23)
        finite = top < _INFINITE
        inverse = tl.where(finite, (254 << 23) - bits, _NAN)
        return tl.where(finite, bits, _NAN).to(tl.float32, bitcast=True), inverse.to(tl.float32, bitcast=True)
    else:
        MAX: tl.constexpr = SPEC.max
        multiplier = multiplier_of(top, MAX, False)
        return multiplier, tl.div_rn(tl.full(top.shape, 1.0, tl.float32), multiplier)
