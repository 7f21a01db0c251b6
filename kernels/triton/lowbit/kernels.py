"""Kernels of weights that exist only as codes: dequantise them, round an update onto them, change scales of rows.

The formulas are those of ``quartet.kernels.reference.optim.lowbit``, bit for bit. A program serves a row, in chunks of
G groups of four neighbouring columns. A group shares a Philox call and a word of packed codes, and one thread owns it:
its columns are the four members of a tuple of ``[G]`` vectors.

Common arguments: ``cols``; ``width``, groups of a row; ``pitch``, elements of the codes' pointer in a row. WIDE: groups
are whole, and each is one element of that pointer; else it points to bytes. LOW, HIGH, WIDTH: of the grid. PAPER: one
scale for all rows, by which codes are divided. ``key_low`` … ``first``: the random bits, with bit 62 set to keep the
integers 64 bits wide.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quartet.kernels.reference.optim import lowbit as ref
from quartet.kernels.reference.philox import _M0, _M1, _W0, _W1
from quartet.kernels.triton.memory import INTERPRETED, opaque, tile4

_A, _B = tl.constexpr(_M0), tl.constexpr(_M1)
_STEP_A, _STEP_B = tl.constexpr(_W0), tl.constexpr(_W1)
_UNUSED = tl.constexpr(32 - ref.RANDOM_BITS)
_ONE = tl.constexpr(float(1 << ref.RANDOM_BITS))
_STEPS = tl.constexpr(float(ref.RESIDUAL_STEPS))
_LIMIT = tl.constexpr(ref.RADIAL_LIMIT)
_ABOVE, _BELOW = tl.constexpr(ref.TOLERANCE), tl.constexpr(1 / ref.TOLERANCE)
_MAGIC = tl.constexpr(1.5 * 2.0**23)  # x + it − it rounds |x| < 2^22 to an integer, ties to even
_ARGUMENTS = ["key_low", "key_high", "site", "step", "first"]


# ---- groups in memory --------------------------------------------------------------------------------------------


@triton.constexpr_function
def _nothing(low, width):
    """The word of four codes of 0, as the signed number that a load of it is."""
    word = 0 if width == 8 else sum(-low << width * i for i in range(4))
    return word - 65536 if width == 4 and word >= 32768 else word


@triton.jit
def _bytes(line, group, byte, BYTES: tl.constexpr):
    """Pointers that do not look as if they followed each other, so that each thread takes the words of its groups."""
    if INTERPRETED:
        return line + group * BYTES + byte
    else:
        return line + opaque(group) * BYTES + byte


@triton.jit
def _words(line, group, width, pitch, NOTHING: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr):
    """int32 ``[G]``: the stored bits of each group of a row, the first code in the low ones."""
    if WIDE:
        return tl.load(_bytes(line, group, 0, 1), mask=group < width, other=NOTHING).to(tl.int32)
    else:
        BYTES: tl.constexpr = WIDTH // 2
        word = tl.zeros(group.shape, tl.int32)
        for k in tl.static_range(BYTES):
            inside = group * BYTES + k < pitch
            byte = tl.load(_bytes(line, group, k, BYTES), mask=inside, other=NOTHING & 0xFF).to(tl.int32)
            word = word | (byte << (8 * k))
        return word


@triton.jit
def _store_words(line, word, group, width, pitch, WIDTH: tl.constexpr, WIDE: tl.constexpr):
    """The mirror of :func:`_words`."""
    if WIDE:
        tl.store(_bytes(line, group, 0, 1), word.to(line.dtype.element_ty), mask=group < width)
    else:
        BYTES: tl.constexpr = WIDTH // 2
        for k in tl.static_range(BYTES):
            byte = ((word >> (8 * k)) & 0xFF).to(tl.uint8)
            tl.store(_bytes(line, group, k, BYTES), byte, mask=group * BYTES + k < pitch)


@triton.jit
def _codes(word, group, cols, LOW: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr):
    """Four int32 ``[G]``; 0 beyond the last column."""
    codes = ()
    for i in tl.static_range(4):
        if WIDTH == 8:
            code = (word << (24 - 8 * i)) >> 24
        else:
            code = ((word >> (WIDTH * i)) & ((1 << WIDTH) - 1)) + LOW
        if not WIDE:
            code = tl.where(group * 4 + i < cols, code, 0)
        codes = codes + (code,)
    return codes


@triton.jit
def _bits(code, i: tl.constexpr, LOW: tl.constexpr, WIDTH: tl.constexpr):
    """Where code ``i`` goes in the word of its group."""
    if WIDTH == 8:
        return (code & 0xFF) << (8 * i)
    else:
        return (code - LOW) << (WIDTH * i)


@triton.jit
def _inside(group, column, cols, width, WIDE: tl.constexpr):
    """Mask ``[G, 4]`` of columns that exist."""
    if WIDE:
        return (group < width)[:, None] & (column >= 0)
    else:
        return column < cols


@triton.jit
def _numbers(line, group, cols, width, WIDE: tl.constexpr):
    """Four fp32 ``[G]`` of the groups' columns; 0 where there are none."""
    column = group[:, None] * 4 + tl.arange(0, 4)[None, :]
    tile = tl.load(line + column, mask=_inside(group, column, cols, width, WIDE), other=0.0)
    even, odd = tl.split(tl.reshape(tile, (tile.shape[0], 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _line(pointer, row, cols, width, WIDE: tl.constexpr):
    """Where a row of an fp32 matrix starts."""
    if WIDE:
        return pointer + row * width * 4
    else:
        return pointer + row * cols


# ---- numbers -----------------------------------------------------------------------------------------------------


@triton.jit
def _keys(low, high):
    """Philox's two keys for each of ten rounds."""
    keys = ()
    for i in tl.static_range(10):
        keys = keys + (low.to(tl.uint32) + tl.full((), i * _STEP_A % 2**32, tl.uint32),
                       high.to(tl.uint32) + tl.full((), i * _STEP_B % 2**32, tl.uint32))
    return keys


@triton.jit
def _draws(keys, row, group, width, site, step, first):
    """Four fp32 ``[G]`` of the bits of ``reference.lowbit.random_words``: integers below 2^24."""
    at = (first & 0x3FFFFFFFFFFFFFFF) + row * width + group.to(tl.int64)
    c0, c1 = at.to(tl.uint32), (at >> 32).to(tl.uint32)
    c2, c3 = tl.zeros_like(c0) + site.to(tl.uint32), tl.zeros_like(c0) + step.to(tl.uint32)
    for i in tl.static_range(10):
        p0, p1 = c0.to(tl.uint64) * _A, c2.to(tl.uint64) * _B
        c0, c2 = (p1 >> 32).to(tl.uint32) ^ c1 ^ keys[2 * i], (p0 >> 32).to(tl.uint32) ^ c3 ^ keys[2 * i + 1]
        c1, c3 = p1.to(tl.uint32), p0.to(tl.uint32)
    words, draws = (c0, c1, c2, c3), ()
    for i in tl.static_range(4):
        draws = draws + ((words[i] >> _UNUSED).to(tl.int32).to(tl.float32),)
    return draws


@triton.jit
def _stochastic(z, draw):
    below = tl.floor(z)
    return below + (draw < (z - below) * _ONE).to(tl.float32)


@triton.jit
def _clamped(x, LOW: tl.constexpr, HIGH: tl.constexpr):
    """fp32 that is no NaN between two integers."""
    return tl.minimum(tl.maximum(x, LOW * 1.0), HIGH * 1.0)


@triton.jit
def _tree_sum(x):
    """The sum of ``[G]``: first half plus second half, repeatedly."""
    for _ in tl.static_range(16):
        if x.shape[0] > 1:
            x = tl.sum(tl.reshape(x, (2, x.shape[0] // 2)), axis=0)
    return tl.sum(x, axis=0)


@triton.jit
def _divided(x, by):
    return tl.div_rn(x, tl.zeros_like(x) + by)


@triton.jit
def _weight(code, scale, PAPER: tl.constexpr):
    """fp32 numbers of codes."""
    if PAPER:
        return _divided(code.to(tl.float32), scale)
    else:
        return code.to(tl.float32) * scale


# ---- kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def expand(codes, scales, values, cols, width, pitch, LOW: tl.constexpr, WIDTH: tl.constexpr, PAPER: tl.constexpr,
           WIDE: tl.constexpr, G: tl.constexpr):
    """fp32 numbers of one chunk of a row."""
    chunks = tl.cdiv(width, G)
    row = (tl.program_id(0) // chunks).to(tl.int64)
    group = tl.program_id(0) % chunks * G + tl.arange(0, G)
    scale = tl.load(scales if PAPER else scales + row)
    word = _words(codes + row * pitch, group, width, pitch, _nothing(LOW, WIDTH), WIDTH, WIDE)
    code = _codes(word, group, cols, LOW, WIDTH, WIDE)
    x = ()
    for i in tl.static_range(4):
        x = x + (_weight(code[i], scale, PAPER),)
    column = group[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(_line(values, row, cols, width, WIDE) + column, tile4(x), mask=_inside(group, column, cols, width, WIDE))


@triton.jit(do_not_specialize=_ARGUMENTS)
def absorb(codes, before, scales, values, residual, flips, key_low, key_high, site, step, first, cols, width, pitch,
           LOW: tl.constexpr, HIGH: tl.constexpr, WIDTH: tl.constexpr, PAPER: tl.constexpr, RADIAL: tl.constexpr,
           FEEDBACK: tl.constexpr, WIDE: tl.constexpr, ONE: tl.constexpr, G: tl.constexpr):
    """Round new values onto the grid, and count the codes that change.

    before: the scales to read, which PAPER's programs share. RADIAL: along the row into its scale first. ONE: a row is
    one chunk, and is read once; else RADIAL reads it twice. A value that is not finite makes the scale a NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(before if PAPER else before + row)
    keys = _keys(key_low, key_high)
    line, numbers = codes + row * pitch, _line(values, row, cols, width, WIDE)
    first_group = tl.arange(0, G)
    first_word = _words(line, first_group, width, pitch, _nothing(LOW, WIDTH), WIDTH, WIDE)
    first_x = _numbers(numbers, first_group, cols, width, WIDE)
    share, after = tl.full((), 0.0, tl.float32), scale
    if RADIAL:
        along, square = _along(tl.zeros((G,), tl.float32), tl.zeros((G,), tl.int32),
                               _codes(first_word, first_group, cols, LOW, WIDTH, WIDE), first_x, scale)
        if not ONE:
            for k in range(1, tl.cdiv(width, G)):
                group = k * G + tl.arange(0, G)
                word = _words(line, group, width, pitch, _nothing(LOW, WIDTH), WIDTH, WIDE)
                x = _numbers(numbers, group, cols, width, WIDE)
                along, square = _along(along, square, _codes(word, group, cols, LOW, WIDTH, WIDE), x, scale)
        norm = tl.sum(square.to(tl.int64), axis=0).to(tl.float32) * scale
        share = tl.div_rn(_tree_sum(along), tl.where(norm == 0.0, 1.0, norm))
        share = tl.where(share == share, share, 0.0)
        share = tl.where(share > _LIMIT, _LIMIT, tl.where(share < -_LIMIT, -_LIMIT, share))
        after = scale * (share + 1.0)
    inverse = tl.div_rn(tl.full((), 1.0, tl.float32), after)
    if ONE:
        count, bad = _absorbed(line, residual, first_word, first_x, scale, inverse, share, keys, row, first_group, site,
                               step, first, cols, width, pitch, LOW, HIGH, WIDTH, PAPER, RADIAL, FEEDBACK, WIDE)
    else:
        count, bad = tl.zeros((G,), tl.int32), tl.zeros((G,), tl.float32)
        for k in range(tl.cdiv(width, G)):
            group = k * G + tl.arange(0, G)
            word = _words(line, group, width, pitch, _nothing(LOW, WIDTH), WIDTH, WIDE)
            x = _numbers(numbers, group, cols, width, WIDE)
            more, worse = _absorbed(line, residual, word, x, scale, inverse, share, keys, row, group, site, step, first,
                                    cols, width, pitch, LOW, HIGH, WIDTH, PAPER, RADIAL, FEEDBACK, WIDE)
            count, bad = count + more, bad + worse
    after += tl.sum(bad, axis=0)
    if RADIAL:
        tl.store(scales + row, after)
    else:
        tl.store(scales if PAPER else scales + row, after, mask=after != after)
    tl.atomic_add(flips, tl.sum(count, axis=0).to(tl.int64), sem="relaxed")


@triton.jit
def _along(along, square, code, x, scale):
    """Add each group's sums of Δ · code and of the codes' squares."""
    product = ()
    for i in tl.static_range(4):
        old = code[i].to(tl.float32)
        product = product + ((x[i] - old * scale) * old,)
        square += code[i] * code[i]
    return along + ((product[0] + product[1]) + (product[2] + product[3])), square


@triton.jit
def _absorbed(line, residual, word, x, scale, inverse, share, keys, row, group, site, step, first, cols, width, pitch,
              LOW: tl.constexpr, HIGH: tl.constexpr, WIDTH: tl.constexpr, PAPER: tl.constexpr, RADIAL: tl.constexpr,
              FEEDBACK: tl.constexpr, WIDE: tl.constexpr):
    """Write the codes (and residuals) of one chunk.

    Returns, of each group: how many codes changed, int32 ``[G]``, and fp32 0, or NaN where a value is not finite.
    """
    code = _codes(word, group, cols, LOW, WIDTH, WIDE)
    kept = code
    if FEEDBACK:
        residual_pitch = width if WIDE else cols
        residual += row * residual_pitch
        kept = _codes(_words(residual, group, width, residual_pitch, 0, 8, WIDE), group, cols, 0, 8, WIDE)
    draws = _draws(keys, row, group, width, site, step, first)
    stored, left, count, bad = tl.zeros_like(word), tl.zeros_like(word), tl.zeros_like(word), tl.zeros_like(x[0])
    for i in tl.static_range(4):
        bad += x[i] - x[i]
        old, weight = code[i].to(tl.float32), _weight(code[i], scale, PAPER)
        delta = x[i] - weight
        if RADIAL:
            delta = delta - weight * share
        if FEEDBACK:
            steps = delta * (scale if PAPER else inverse)
            z = old + kept[i].to(tl.float32) * (1.0 / _STEPS) + tl.where(steps == steps, steps, 0.0)
            new = (_clamped(z, LOW, HIGH) + _MAGIC) - _MAGIC
            rest = _clamped(_stochastic((z - new) * _STEPS, draws[i]), -128, 127)
            left = left | _bits(rest.to(tl.int32), i, 0, 8)
        else:
            if PAPER:
                new = _stochastic((weight + delta) * scale, draws[i])
            else:
                new = old + _stochastic(delta * inverse, draws[i])
            new = _clamped(tl.where(new == new, new, old), LOW, HIGH)
        now = new.to(tl.int32)
        count += (now != code[i]).to(tl.int32)
        stored = stored | _bits(now, i, LOW, WIDTH)
    _store_words(line, stored, group, width, pitch, WIDTH, WIDE)
    if FEEDBACK:
        _store_words(residual, left, group, width, residual_pitch, 8, WIDE)
    return count, bad


@triton.jit(do_not_specialize=_ARGUMENTS)
def rescale(codes, scales, key_low, key_high, site, step, first, inverse, cols, width, pitch, LOW: tl.constexpr,
            HIGH: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, G: tl.constexpr):
    """A new scale of a row whose mean |code| has drifted, and its codes on the new grid.

    ``inverse``: fp32, one over what Σ|code| of a row should be.
    """
    row = tl.program_id(0).to(tl.int64)
    line = codes + row * pitch
    total = tl.zeros((G,), tl.int32)
    for k in range(tl.cdiv(width, G)):
        group = k * G + tl.arange(0, G)
        word = _words(line, group, width, pitch, _nothing(LOW, WIDTH), WIDTH, WIDE)
        code = _codes(word, group, cols, LOW, WIDTH, WIDE)
        for i in tl.static_range(4):
            total += tl.abs(code[i])
    drift = tl.sum(total.to(tl.int64), axis=0).to(tl.float32) * inverse
    if ((drift > _ABOVE) | (drift < _BELOW)) & (drift > 0.0):
        keys = _keys(key_low, key_high)
        factor = tl.where(drift > 2.0, 2.0, tl.where(drift < 0.5, 0.5, drift))
        for k in range(tl.cdiv(width, G)):
            group = k * G + tl.arange(0, G)
            word = _words(line, group, width, pitch, _nothing(LOW, WIDTH), WIDTH, WIDE)
            code = _codes(word, group, cols, LOW, WIDTH, WIDE)
            draws = _draws(keys, row, group, width, site, step, first)
            stored = tl.zeros_like(word)
            for i in tl.static_range(4):
                new = _stochastic(_divided(code[i].to(tl.float32), factor), draws[i])
                stored = stored | _bits(_clamped(new, LOW, HIGH).to(tl.int32), i, LOW, WIDTH)
            _store_words(line, stored, group, width, pitch, WIDTH, WIDE)
        tl.store(scales + row, tl.load(scales + row) * factor)
