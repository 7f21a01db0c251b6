"""Device functions on a block that one thread owns whole: a tuple of N vectors, element i of many blocks each.

Butterflies and sums along a block are then plain additions between the tuple's members, in the order that
``quartet.kernels.reference`` pins, with no exchange between threads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quartet.kernels.triton.memory import INTERPRETED, load4


@triton.jit
def _stage(x, N: tl.constexpr, S: tl.constexpr):
    y = ()
    for i in tl.static_range(N):
        if i & S == 0:
            y = y + (x[i] + x[i + S],)
        else:
            y = y + (x[i - S] - x[i],)
    return y


@triton.jit
def hadamard(x, signs, N: tl.constexpr, ROTATION: tl.constexpr, INVERSE: tl.constexpr):
    """Butterflies with strides ROTATION/2 … 1, one multiplication by 1/√ROTATION, signs before (after if INVERSE)."""
    if ROTATION > 0:
        x = last_stage(first_stages(x, None if INVERSE else signs, N, ROTATION), N, ROTATION)
    if INVERSE and signs is not None:
        x = signed(x, signs, N, ROTATION)
    return x


@triton.jit
def first_stages(x, signs, N: tl.constexpr, ROTATION: tl.constexpr):
    """Signs before, if there are any, and the butterflies with strides ROTATION/2 … 2."""
    if signs is not None:
        x = _signed_stage(x, signs, N, ROTATION)
    else:
        x = _stage(x, N, ROTATION // 2)
    if ROTATION == 128:
        x = _stage(x, N, 32)
    if ROTATION >= 64:
        x = _stage(x, N, 16)
    if ROTATION >= 32:
        x = _stage(x, N, 8)
    return _stage(_stage(x, N, 4), N, 2)


@triton.jit
def last_stage(x, N: tl.constexpr, ROTATION: tl.constexpr):
    """The butterfly with stride 1 and the multiplication by 1/√ROTATION."""
    return scaled(_stage(x, N, 1), _inverse_root(ROTATION), N)


@triton.jit
def last_stage_amax_bits(x, N: tl.constexpr, ROTATION: tl.constexpr):
    """:func:`amax_bits` of what :func:`last_stage` makes of ``x``.

    The larger of |a + b| and |a − b| is |a| + |b|, rounded or not, and a product's rounding keeps the order.
    """
    top = tl.zeros_like(x[0]).to(tl.int32)
    for i in tl.static_range(N // 2):
        larger = (tl.abs(x[2 * i]) + tl.abs(x[2 * i + 1])).to(tl.int32, bitcast=True)
        if INTERPRETED:
            larger &= 0x7FFFFFFF  # a GPU's NaN has no sign
        top = tl.maximum(top, larger)
    return (top.to(tl.float32, bitcast=True) * _inverse_root(ROTATION)).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.constexpr_function
def _inverse_root(n):
    return float(n) ** -0.5


@triton.jit
def _load_signs(signs, like, ROTATION: tl.constexpr):
    s = ()
    if INTERPRETED:
        for i in tl.static_range(ROTATION):
            s = s + (tl.load(signs + i),)
    else:
        for h in tl.static_range(ROTATION // 4):
            words = load4(signs.to(tl.int64) + h * 16 + tl.zeros_like(like).to(tl.int64), tl.zeros_like(like) == 0.0)
            for k in tl.static_range(4):
                s = s + (words[k].to(tl.float32, bitcast=True),)
    return s


@triton.jit
def _signed_stage(x, signs, N: tl.constexpr, ROTATION: tl.constexpr):
    """Signs and the first stage: a product with ±1 is exact, so it may ride in a multiply-add."""
    S: tl.constexpr = ROTATION // 2
    s = _load_signs(signs, x[0], ROTATION)
    y = ()
    for i in tl.static_range(N):
        if i & S == 0:
            y = y + (tl.fma(x[i + S], s[(i + S) % ROTATION], x[i] * s[i % ROTATION]),)
        else:
            # times −1, for Triton's minus is a subtraction from 0
            y = y + (tl.fma(x[i], s[i % ROTATION] * -1.0, x[i - S] * s[(i - S) % ROTATION]),)
    return y


@triton.jit
def signed(x, signs, N: tl.constexpr, ROTATION: tl.constexpr):
    s = _load_signs(signs, x[0], ROTATION)
    y = ()
    for i in tl.static_range(N):
        y = y + (x[i] * s[i % ROTATION],)
    return y


@triton.jit
def _fold(x, H: tl.constexpr):
    y = ()
    for i in tl.static_range(H):
        y = y + (x[i] + x[i + H],)
    return y


@triton.jit
def tree_sum(x, N: tl.constexpr):
    """Sum of N vectors, first half plus second half, repeatedly."""
    if N == 128:
        x = _fold(x, 64)
    if N >= 64:
        x = _fold(x, 32)
    if N >= 32:
        x = _fold(x, 16)
    if N >= 16:
        x = _fold(x, 8)
    return _fold(_fold(_fold(x, 4), 2), 1)[0]


@triton.jit
def squares(x, N: tl.constexpr):
    y = ()
    for i in tl.static_range(N):
        y = y + (x[i] * x[i],)
    return y


@triton.jit
def scaled(x, by, N: tl.constexpr):
    y = ()
    for i in tl.static_range(N):
        y = y + (x[i] * by,)
    return y


@triton.jit
def amax_bits(x, N: tl.constexpr):
    """Bits of the largest magnitude, int32: in the order of the numbers, with infinity and NaN on top."""
    if INTERPRETED:
        m = x[0].to(tl.int32, bitcast=True) & 0x7FFFFFFF
        for i in tl.static_range(1, N):
            m = tl.maximum(m, x[i].to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        return m
    else:
        m = tl.abs(x[0])
        for i in tl.static_range(1, N):
            m = tl.maximum(m, tl.abs(x[i]), propagate_nan=tl.PropagateNan.ALL)
        return m.to(tl.int32, bitcast=True) & 0x7FFFFFFF
