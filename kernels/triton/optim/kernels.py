"""Kernels of an optimizer step over many tensors at once: pointers come from tables on the device.

``prepare`` makes each tensor's numbers, ``update`` is the one pass over memory. States with one scale a tensor take
``update`` with MEASURE before it, whose programs end at once where the scale is known, and ``settle``.

Tables: ``pointers`` int64 ``[T, POINTERS]`` (weight, three states' codes, their scales, step), ``gradients`` int64
``[T]``, ``sizes`` int64 ``[T, SIZES]`` (tiles, tiles a row, width of a row, site, first group of random bits, first
chunk), ``chunks`` int32 (the tensor of each chunk of LOOPS · R tiles), ``work`` fp32 ``[T, WORK]`` (nine coefficients,
the step or −1 to skip it, three scales to decode with, three to encode with).
"""

from __future__ import annotations

import triton
import triton.language as tl

from quartet.kernels.triton.memory import tile8
from quartet.kernels.triton.optim.codes import (
    bits_of,
    block_scale,
    decode,
    encode,
    expanded_encode,
    float_of,
    largest,
    load_float,
    store_float,
    word,
)

POINTERS = tl.constexpr(8)
SIZES = tl.constexpr(6)
WORK = tl.constexpr(16)
_STEP = tl.constexpr(9)
_DECODE = tl.constexpr(10)
_ENCODE = tl.constexpr(13)


@triton.jit(do_not_specialize=["at", *"abcdefghijkmnopq"])
def put16(table, at, a, b, c, d, e, f, g, h, i, j, k, m, n, o, p, q):  # noqa: E741
    """Sixteen integers below 2^62 that arrive as arguments, into an int64 table from element ``at`` on.

    The arguments have bit 62 set, which makes them all 64 bits wide.
    """
    words = (a, b, c, d, e, f, g, h, i, j, k, m, n, o, p, q)
    for w in tl.static_range(16):
        tl.store(table + at + w, words[w] & 0x3FFFFFFFFFFFFFFF)


@triton.jit
def _number(bits):
    """float64 whose bits came as an integer; −0 becomes 0."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True) + 0.0


@triton.jit
def _power(base, n):
    """``base ** n`` in the order of ``reference.optimizers.power``."""
    result = base * 0.0 + 1.0
    for _ in tl.static_range(24):
        result = tl.where((n & 1) == 1, result * base, result)
        base = base * base
        n = n >> 1
    return result


@triton.jit(do_not_specialize=["lr", "beta1", "beta2", "eps", "decay"])
def prepare(pointers, work, lr, beta1, beta2, eps, decay, lr_tensor, grad_scale, found_inf, KIND: tl.constexpr,
            STATES: tl.constexpr, MAXIMIZE: tl.constexpr):
    """Count the step of each tensor and write its row of ``work``. ``lr`` … ``decay``: bits of float64.

    KIND: a ``reference.optim.optimizers.Kind``. STATES: a ``States``.
    """
    t = tl.program_id(0)
    row = work + t * WORK
    step_at = tl.load(pointers + t * POINTERS + 7).to(tl.pointer_type(tl.float32))
    step = tl.load(step_at) + 1.0
    skipped = step < 0.0
    if found_inf is not None:
        skipped = tl.load(found_inf) != 0.0
    if skipped:
        tl.store(row + _STEP, -1.0)
    else:
        tl.store(step_at, step)
        tl.store(row + _STEP, step)
        rate = _number(lr)
        if lr_tensor is not None:
            rate = tl.load(lr_tensor).to(tl.float64)
        b1, b2, wd = _number(beta1), _number(beta2), _number(decay)
        one = b1 * 0.0 + 1.0
        gradient = one
        if grad_scale is not None:
            gradient = one / tl.load(grad_scale).to(tl.float64)
        if MAXIMIZE:
            gradient = -gradient
        weight, share = one - rate * wd, one * 0.0
        if KIND.share:
            weight, share = one, wd
        a, b, c, size, root = one * 0.0, one * 0.0, one * 0.0, -rate, one
        if KIND.algorithm == "adam":
            a, b, c = one - b1, b2, one - b2
            n = step.to(tl.int32)
            size = -(rate / (one - _power(b1, n)))
            root = one / tl.sqrt(one - _power(b2, n))
        elif KIND.algorithm == "lion":
            a, b = one - b1, one - b2
        else:
            first = step == 1.0
            a, b, c = tl.where(first, one * 0.0, b1), tl.where(first, one, b2), b1
        values = (gradient, weight, share, a, b, c, size, root, _number(eps))
        for i in tl.static_range(9):
            tl.store(row + i, values[i].to(tl.float32))
        for s in tl.static_range(3):
            if STATES.modes[s] == "tensor" or STATES.modes[s] == "current":
                scale_at = tl.load(pointers + t * POINTERS + 4 + s).to(tl.pointer_type(tl.float32))
                tl.store(row + _DECODE + s, tl.load(scale_at))
                unknown = tl.load(scale_at + 1) == 0.0
                if STATES.modes[s] == "current":
                    unknown = step > 0.0
                    tl.store(scale_at + 1, 0.0)
                tl.store(row + _ENCODE + s, unknown.to(tl.float32))


@triton.constexpr_function
def _target(element, mode):
    """What the largest known magnitude is scaled to."""
    return largest(element) * (0.5 if mode == "tensor" else 1.0)


@triton.jit
def settle(pointers, work, STATES: tl.constexpr):
    """The scales to encode with, of states with one a tensor; their largest magnitude starts again from 0."""
    t = tl.program_id(0)
    row = work + t * WORK
    if tl.load(row + _STEP) >= 0.0:
        for s in tl.static_range(3):
            if STATES.modes[s] == "tensor" or STATES.modes[s] == "current":
                scale_at = tl.load(pointers + t * POINTERS + 4 + s).to(tl.pointer_type(tl.float32))
                amax = tl.load(scale_at + 1)
                if STATES.elements[s] == "fp16":
                    scale = float_of((bits_of(amax) + 0x7FFFFF) & -0x800000) * 6.103515625e-05
                else:
                    scale = tl.div_rn(amax, amax * 0.0 + _target(STATES.elements[s], STATES.modes[s]))
                scale = tl.where(scale < 1.1754943508222875e-38, 1.1754943508222875e-38, scale)
                old = tl.load(scale_at)
                old = tl.where(old > 0.0, old, 1.0)
                scale = tl.where((amax > 0.0) & (amax < float("inf")), scale, old)
                tl.store(row + _ENCODE + s, scale)
                tl.store(scale_at, scale)
                tl.store(scale_at + 1, 0.0)


@triton.jit(do_not_specialize=["seed"])
def update(pointers, gradients, sizes, chunks, work, seed, KIND: tl.constexpr, STATES: tl.constexpr,
           P: tl.constexpr, G: tl.constexpr, SCALED: tl.constexpr, MEASURE: tl.constexpr, ALIGNED: tl.constexpr,
           HARDWARE: tl.constexpr, R: tl.constexpr, B: tl.constexpr, LOOPS: tl.constexpr):
    """One chunk: read weight, gradient and codes, write weight and codes.

    KIND: a ``reference.optim.optimizers.Kind``. STATES: a ``States``. P, G: formats of weight and gradient.
    SCALED: the gradient has a factor other than 1.
    MEASURE: only find the largest magnitudes that are not known. ALIGNED: whole tiles at multiples of 16 bytes.
    """
    t = tl.load(chunks + tl.program_id(0))
    row = work + t * WORK
    step = tl.load(row + _STEP)
    wanted = step >= 0.0
    if MEASURE:
        wanted = wanted & _unknown(row, STATES)
    if wanted:
        moments: tl.constexpr = KIND.moments
        table = pointers + t * POINTERS
        size = sizes + t * SIZES
        count, per_row, width = tl.load(size), tl.load(size + 1), tl.load(size + 2)
        start = (tl.program_id(0) - tl.load(size + 5)) * (R * LOOPS)
        first_group = tl.load(size + 4)
        site = tl.load(size + 3).to(tl.uint32)
        p_at = tl.load(table).to(tl.pointer_type(word(P)))
        g_at = tl.load(gradients + t).to(tl.pointer_type(word(G)))
        code_at, scale_at, tops = (), (), ()
        for s in tl.static_range(3):
            at = tl.load(table + 1 + s).to(tl.pointer_type(word(STATES.elements[s])))
            if ALIGNED:
                at = tl.multiple_of(at, 16)
            code_at = code_at + (at,)
            scale_at = scale_at + (tl.load(table + 4 + s).to(tl.pointer_type(tl.float32)),)
        if ALIGNED:
            p_at, g_at = tl.multiple_of(p_at, 16), tl.multiple_of(g_at, 16)
        c = ()
        for i in tl.static_range(9):
            c = c + (tl.load(row + i),)
        top0 = tl.zeros((R, B), tl.int32)
        top1, top2 = top0, top0
        column = tl.arange(0, B)
        for loop in range(LOOPS):
            first = start + loop * R
            tiles = first + tl.arange(0, R)
            if ALIGNED:
                base = first * B
                place = tl.arange(0, R)[:, None] * B + column[None, :]
                inside = (tiles < count)[:, None]
            else:
                line = tiles // per_row
                within = (tiles - line * per_row)[:, None] * B + column[None, :]
                base = first * 0
                place = line[:, None] * width + within
                inside = (tiles < count)[:, None] & (within < width)
            p = load_float(p_at + base + place, inside, P)
            g = load_float(g_at + base + place, inside, G)
            old = ()
            for s in tl.static_range(3):
                if STATES.modes[s] != "":
                    codes = tl.load(code_at[s] + base + place, mask=inside, other=0)
                    old = old + (_decoded(codes, scale_at[s], row + _DECODE + s, tiles, count, STATES, s, HARDWARE),)
            if KIND.master:
                p = old[moments]
            if SCALED:
                g = g * c[0]
            if KIND.share:
                g = g + p * c[2]
            new = ()
            if KIND.algorithm == "adam":
                new = ((g - old[0]) * c[3] + old[0], g * c[5] * g + old[1] * c[4])
            elif KIND.algorithm == "lion":
                new = ((g - old[0]) * c[4] + old[0],)
            elif moments == 1:
                new = (old[0] * c[3] + g * c[4],)
            if not MEASURE:
                w = p * c[1]
                if KIND.algorithm == "adam":
                    w = w + tl.div_rn(new[0] * c[6], tl.sqrt_rn(new[1]) * c[7] + c[8])
                elif KIND.algorithm == "lion":
                    direction = (g - old[0]) * c[3] + old[0]
                    w = w + tl.where(direction > 0.0, c[6], tl.where(direction < 0.0, -c[6], direction * 0.0))
                elif moments == 0:
                    w = w + g * c[6]
                elif KIND.nesterov:
                    w = w + (new[0] * c[5] + g) * c[6]
                else:
                    w = w + new[0] * c[6]
                if KIND.master:
                    new = new + (w,)
                for s in tl.static_range(3):
                    if STATES.modes[s] != "":
                        _write(new[s], code_at[s] + base + place, inside, scale_at[s], row + _ENCODE + s, tiles, count,
                               STATES, s, HARDWARE)
                if KIND.stochastic:
                    _store_stochastic(p_at + base + place, w, inside, seed, site, step,
                                      first_group + first * (B // 8), R, B)
                else:
                    store_float(p_at + base + place, w, inside, P)
            for s in tl.static_range(3):
                if _finds(STATES.modes[s], s, moments, MEASURE):
                    bits = bits_of(new[s]) & 0x7FFFFFFF
                    if not ALIGNED:
                        bits = tl.where(inside, bits, 0)
                    if s == 0:
                        top0 = tl.maximum(top0, bits)
                    elif s == 1:
                        top1 = tl.maximum(top1, bits)
                    else:
                        top2 = tl.maximum(top2, bits)
        tops = (top0, top1, top2)
        for s in tl.static_range(3):
            if _finds(STATES.modes[s], s, moments, MEASURE):
                if not MEASURE or tl.load(row + _ENCODE + s) == 1.0:
                    most = tl.max(tl.max(tops[s], 1), 0)
                    tl.atomic_max((scale_at[s] + 1).to(tl.pointer_type(tl.int32), bitcast=True), most, sem="relaxed")


@triton.constexpr_function
def _finds(mode, s, moments, measure):
    """Whether a pass finds the largest magnitude of state s."""
    return s < moments and mode in ("tensor", "current") if measure else mode == "tensor"


@triton.jit
def _unknown(row, STATES: tl.constexpr):
    """Whether a state's largest magnitude has to be measured."""
    found = tl.load(row + _STEP) < -2.0
    for s in tl.static_range(3):
        if STATES.modes[s] == "tensor" or STATES.modes[s] == "current":
            found = found | (tl.load(row + _ENCODE + s) == 1.0)
    return found


@triton.jit
def _decoded(codes, scales, tensor_scale, tiles, count, STATES: tl.constexpr, S: tl.constexpr, HARDWARE: tl.constexpr):
    ELEMENT: tl.constexpr = STATES.elements[S]
    MODE: tl.constexpr = STATES.modes[S]
    if MODE == "plain":
        return decode(codes, 1.0, 1.0, ELEMENT, MODE, HARDWARE)
    elif MODE == "tensor" or MODE == "current":
        return decode(codes, tl.load(tensor_scale), 1.0, ELEMENT, MODE, HARDWARE)
    elif MODE == "expanded":
        top = tl.load(scales + tiles * 2, mask=tiles < count, other=0.0)
        k = tl.load(scales + tiles * 2 + 1, mask=tiles < count, other=0.0)
        return decode(codes, top[:, None], k[:, None], ELEMENT, MODE, HARDWARE)
    else:
        scale = tl.load(scales + tiles, mask=tiles < count, other=0.0)
        return decode(codes, scale[:, None], 1.0, ELEMENT, MODE, HARDWARE)


@triton.jit
def _write(x, pointers, inside, scales, tensor_scale, tiles, count, STATES: tl.constexpr, S: tl.constexpr,
           HARDWARE: tl.constexpr):
    ELEMENT: tl.constexpr = STATES.elements[S]
    MODE: tl.constexpr = STATES.modes[S]
    if MODE == "plain":
        store_float(pointers, x, inside, ELEMENT)
    elif MODE == "expanded":
        codes, top, k = expanded_encode(tl.where(inside, x, 0.0), HARDWARE)
        tl.store(pointers, codes, mask=inside)
        tl.store(scales + tiles * 2, top, mask=tiles < count)
        tl.store(scales + tiles * 2 + 1, k, mask=tiles < count)
    elif MODE == "block":
        scale = block_scale(tl.max(bits_of(tl.where(inside, x, 0.0)) & 0x7FFFFFFF, 1), ELEMENT)
        inverse = tl.div_rn(tl.zeros_like(scale) + 1.0, scale)
        tl.store(pointers, encode(x, inverse[:, None], ELEMENT, HARDWARE), mask=inside)
        tl.store(scales + tiles, scale, mask=tiles < count)
    else:
        scale = tl.load(tensor_scale)
        tl.store(pointers, encode(x, tl.div_rn(scale * 0.0 + 1.0, scale), ELEMENT, HARDWARE), mask=inside)


@triton.jit
def _store_stochastic(pointers, x, inside, seed, site, step, first_group, R: tl.constexpr, B: tl.constexpr):
    """bfloat16 of ``x``, rounded with the bits of ``reference.optimizers.random_halves``."""
    N: tl.constexpr = R * B // 8
    group = first_group + tl.arange(0, N)
    low, high = group.to(tl.uint32), (group >> 32).to(tl.uint32)
    words = tl.philox(seed, low, high, tl.zeros_like(low) + site, tl.zeros_like(low) + step.to(tl.uint32))
    halves = ()
    for w in tl.static_range(4):
        halves = halves + ((words[w] & 0xFFFF).to(tl.int32), (words[w] >> 16).to(tl.int32))
    random = tl.reshape(tile8(halves), (R, B))
    bits = tl.where(x == x, (bits_of(x) + random) >> 16, 0x7FC0)
    tl.store(pointers, bits.to(tl.int16), mask=inside)
