"""Device functions that read and write optimizer states: tiles ``[R, B]`` in fp32, codes as they are stored.

The formulas are those of ``quartet.kernels.reference.optim.states``, bit for bit. ``HARDWARE``: the GPU converts FP8
itself (compute capability 8.9 and above); elsewhere and in the interpreter the same rounding is done with integers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quartet.kernels.reference.optim import states as ref
from quartet.kernels.triton.memory import INTERPRETED

_SMALLEST = tl.constexpr(ref.SMALLEST)
_INFINITE = tl.constexpr(0x7F800000)
_P = tl.constexpr(ref.LOG2_P)
_Q = tl.constexpr(ref.EXP2_Q)
_MAGIC = tl.constexpr(ref.ROUND_MAGIC)
_MAGIC_BITS = tl.constexpr(0x4B400000)
_SQRT2 = tl.constexpr(ref.SQRT2_BITS)
_SPAN = tl.constexpr(ref.EXPANDED_BITS * 16.0)
_LOG2_448 = tl.constexpr(ref.LOG2_448)
_POWERS = tl.constexpr(ref.POWERS)
_INVERSES = tl.constexpr(ref.INVERSES)
_SHIFT = tl.constexpr(ref.SHIFT)
_TOP = tl.constexpr(ref.TOP_SIGNIFICAND)
_SIGNED_MIDDLE = tl.constexpr(ref.MIDPOINTS[True])
_UNSIGNED_MIDDLE = tl.constexpr(ref.MIDPOINTS[False])


@triton.constexpr_function
def largest(element):
    """Largest finite number of an element with a scale; 1 for the dynamic map."""
    return {"e4m3": 448.0, "e5m2": 57344.0, "fp16": 65504.0}.get(element, 1.0)


@triton.jit
def bits_of(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def float_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def load_float(pointers, inside, TYPE: tl.constexpr):
    """fp32 of float32, bfloat16 or float16 numbers at integer-typed pointers, 0 outside."""
    if TYPE == "fp32":
        return tl.load(pointers, mask=inside, other=0.0)
    elif TYPE == "bf16":
        return float_of(tl.load(pointers, mask=inside, other=0).to(tl.int32) << 16)
    else:
        return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_float(pointers, x, inside, TYPE: tl.constexpr):
    """The mirror of :func:`load_float`, to nearest even."""
    if TYPE == "bf16":
        if INTERPRETED:
            bits = bits_of(x)
            near = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            tl.store(pointers, tl.where(x == x, near, 0x7FC0).to(tl.int16), mask=inside)
        else:
            tl.store(pointers, x.to(tl.bfloat16).to(tl.int16, bitcast=True), mask=inside)
    elif TYPE == "fp16":
        tl.store(pointers, x.to(tl.float16), mask=inside)
    else:
        tl.store(pointers, x, mask=inside)


@triton.constexpr_function
def word(type_name):
    """The type that :func:`load_float` and the codes are loaded as."""
    return {"fp32": tl.float32, "bf16": tl.int16, "fp16": tl.float16}.get(type_name, tl.uint8)


@triton.jit
def fp8_decode(codes, ELEMENT: tl.constexpr, HARDWARE: tl.constexpr):
    """fp32 of E4M3 or E5M2 codes (uint8)."""
    if ELEMENT == "e5m2":
        return (codes.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    elif HARDWARE:
        return codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        code = codes.to(tl.int32)
        value = float_of(((code & 0x7F) << 20) | ((code & 0x80) << 24)) * 1.329227995784916e36  # 2^120
        return tl.where((code & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def fp8_encode(x, ELEMENT: tl.constexpr, HARDWARE: tl.constexpr):
    """uint8 codes of fp32, to nearest even, saturating; NaN stays NaN."""
    if HARDWARE:
        return x.to(tl.float8e4nv if ELEMENT == "e4m3" else tl.float8e5).to(tl.uint8, bitcast=True)
    else:
        FRACTION: tl.constexpr = 3 if ELEMENT == "e4m3" else 2
        LEAST: tl.constexpr = -6 if ELEMENT == "e4m3" else -14  # exponent of the least normal number
        MAGIC: tl.constexpr = 2.0 ** (23 + LEAST - FRACTION)
        MAGIC_BITS: tl.constexpr = (127 + 23 + LEAST - FRACTION) << 23
        CUT: tl.constexpr = 23 - FRACTION
        MAX: tl.constexpr = largest(ELEMENT)
        bits = bits_of(x)
        magnitude = bits & 0x7FFFFFFF
        nan = magnitude > _INFINITE
        a = float_of(magnitude)
        a = tl.where(a > MAX, MAX, a)
        magnitude = bits_of(a)
        normal = (magnitude + ((1 << (CUT - 1)) - 1) + ((magnitude >> CUT) & 1)) >> CUT
        normal -= (127 + LEAST - 1) << FRACTION
        small = bits_of(a + MAGIC) - MAGIC_BITS
        code = tl.where(magnitude < ((127 + LEAST) << 23), small, normal)
        code = tl.where(nan, 0x7F, code)
        return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def decode(codes, scale, exponent, ELEMENT: tl.constexpr, MODE: tl.constexpr, HARDWARE: tl.constexpr):
    """fp32 tile of stored codes; ``scale`` and ``exponent`` broadcast over the tile (M and k with range expansion)."""
    if MODE == "plain":
        if ELEMENT == "bf16":
            return float_of(codes.to(tl.int32) << 16)
        else:
            return codes
    elif ELEMENT == "fp16":
        return codes.to(tl.float32) * scale
    elif ELEMENT == "signed" or ELEMENT == "unsigned":
        return _dynamic_decode(codes, ELEMENT) * scale
    elif MODE == "expanded":
        return _expanded_decode(fp8_decode(codes, ELEMENT, HARDWARE), scale, exponent)
    else:
        return fp8_decode(codes, ELEMENT, HARDWARE) * scale


@triton.jit
def block_scale(amax, ELEMENT: tl.constexpr):
    """Scale of a block from the bits of its largest magnitude."""
    scale = float_of(amax)
    if ELEMENT == "e4m3" or ELEMENT == "e5m2":
        scale = tl.div_rn(scale, tl.zeros_like(scale) + largest(ELEMENT))
    return tl.where(scale < _SMALLEST, _SMALLEST, scale)


@triton.jit
def encode(x, inverse, ELEMENT: tl.constexpr, HARDWARE: tl.constexpr):
    """Codes of an fp32 tile times ``inverse``, one over the scale."""
    y = x * inverse
    if ELEMENT == "signed" or ELEMENT == "unsigned":
        return _dynamic_encode(y, ELEMENT)
    elif ELEMENT == "fp16":
        y = tl.where(y > 65504.0, 65504.0, tl.where(y < -65504.0, -65504.0, y))
        return y.to(tl.float16)
    else:
        return fp8_encode(y, ELEMENT, HARDWARE)


# ---- range expansion ---------------------------------------------------------------------------------------------


@triton.jit
def _log2(x):
    bits = bits_of(x)
    fraction = bits & 0x7FFFFF
    above = (fraction | 0x3F800000) >= _SQRT2
    exponent = (bits >> 23) - 127 + above.to(tl.int32)
    f = float_of(fraction | tl.where(above, 0x3F000000, 0x3F800000)) - 1.0
    p = f * _P[5] + _P[4]
    p = p * f + _P[3]
    p = p * f + _P[2]
    p = p * f + _P[1]
    p = p * f + _P[0]
    return p * f + exponent.to(tl.float32)


@triton.jit
def _exp2(x):
    x = tl.where(x < -150.0, -150.0, x)
    shifted = x + _MAGIC
    f = x - (shifted - _MAGIC)
    p = f * _Q[3] + _Q[2]
    p = p * f + _Q[1]
    p = p * f + _Q[0]
    p = p * f + 1.0
    n = bits_of(shifted) - _MAGIC_BITS
    half = n >> 1
    return p * float_of((half + 127) << 23) * float_of((n - half + 127) << 23)


@triton.jit
def expanded_encode(x, HARDWARE: tl.constexpr):
    """Codes of a tile and the M and k of each of its rows, ``[R]``."""
    bits = bits_of(x) & 0x7FFFFFFF
    a = float_of(bits)
    high = float_of(tl.max(bits, 1))
    least = float_of(tl.min(tl.where(a >= _SMALLEST, bits, _INFINITE), 1))
    flat = (high < _SMALLEST) | ((least < high) == 0)
    top = tl.where(high < _SMALLEST, _SMALLEST, high)
    log_top = _log2(tl.where(top < float("inf"), top, 1.0))
    span = tl.where(flat, 1.0, log_top - _log2(tl.where(flat, 1.0, least)))
    k = tl.floor(tl.div_rn(tl.zeros_like(span) + _SPAN, span)) * 0.0625
    k = tl.where(flat, 1.0, tl.where(k > 16.0, 16.0, tl.where(k < 0.0625, 0.0625, k)))
    log = _log2(tl.where((a >= _SMALLEST) & (a < float("inf")), a, 1.0))
    y = _exp2((log - log_top[:, None]) * k[:, None] + _LOG2_448)
    y = tl.where(a >= _SMALLEST, y, 0.0)
    y = tl.where(a < float("inf"), y, float("nan"))
    return fp8_encode(tl.where(x < 0.0, -y, y), "e4m3", HARDWARE), top, k


@triton.jit
def _expanded_decode(values, top, k):
    a = tl.abs(values)
    inverse = tl.div_rn(tl.zeros_like(k) + 1.0, tl.where(k > 0.0, k, 1.0))
    y = _exp2((_log2(tl.where(a > 0.0, a, 1.0)) - _LOG2_448) * inverse)
    y = tl.where(a > 0.0, y, a)
    return tl.where(values < 0.0, -y, y) * top


# ---- the dynamic map ---------------------------------------------------------------------------------------------


@triton.jit
def _dynamic_decode(codes, ELEMENT: tl.constexpr):
    FIRST: tl.constexpr = 0 if ELEMENT == "signed" else 1
    code = codes.to(tl.int32)
    if ELEMENT == "signed":
        j = tl.abs(code - 127)
    else:
        j = tl.where(code == 0, 0, code + 1)
    bits = bits_of(j.to(tl.float32) + 0.5)
    s = float_of((bits & 0x7FFFFF) | 0x3F800000)
    power = tl.zeros_like(s) + _POWERS[0]
    for i in tl.static_range(1, 7):
        power = tl.where(j >= (1 << (i + FIRST)), _POWERS[i], power)
    value = (s * 0.9 - 0.8) * power
    value = tl.where(j >= (128 << FIRST), 1.0, tl.where(j == 0, 0.0, value))
    if ELEMENT == "signed":
        value = tl.where(code < 127, -value, value)
    return value


@triton.jit
def _dynamic_encode(x, ELEMENT: tl.constexpr):
    FIRST: tl.constexpr = 0 if ELEMENT == "signed" else 1
    MIDDLE: tl.constexpr = _SIGNED_MIDDLE if ELEMENT == "signed" else _UNSIGNED_MIDDLE
    a = tl.abs(x)
    inverse = tl.zeros_like(a) + _INVERSES[0]
    cut = tl.zeros_like(bits_of(a)) + (23 - FIRST)
    for i in tl.static_range(1, 7):
        above = a >= MIDDLE[i]
        inverse = tl.where(above, _INVERSES[i], inverse)
        cut = tl.where(above, 23 - i - FIRST, cut)
    s = a * inverse + _SHIFT
    s = tl.where(s < 1.0, 1.0, tl.where(s > _TOP, _TOP, s))
    j = ((bits_of(s) & 0x7FFFFF) | 0x800000) >> cut
    j = tl.where(a >= MIDDLE[7], 128 << FIRST, tl.where(a >= MIDDLE[0], j, 0))
    if ELEMENT == "signed":
        code = tl.where(x < 0.0, 127 - tl.minimum(j, 127), 127 + j)
    else:
        code = tl.where(j > 0, j - 1, 0)
    return code.to(tl.uint8)
