"""Wide loads and stores of thread-owned data.

Written as inline PTX, because Triton would spread a tile over the threads for the sake of its loads and then move it
back, and because its search for such layouts takes minutes on kernels of several hundred vectors. The
interpreter takes the plain form. ``load4`` and ``load_byte`` may read what the same thread has stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def columns8(tile):
    """The eight columns of a ``[B, 8]`` tile."""
    B: tl.constexpr = tile.shape[0]
    even, odd = tl.split(tl.reshape(tile, (B, 4, 2)))
    a, c = tl.split(tl.reshape(even, (B, 2, 2)))
    b, d = tl.split(tl.reshape(odd, (B, 2, 2)))
    x0, x4 = tl.split(a)
    x2, x6 = tl.split(c)
    x1, x5 = tl.split(b)
    x3, x7 = tl.split(d)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def tile4(x):
    """``[B, 4]`` of four vectors."""
    joined = tl.join(tl.join(x[0], x[2]), tl.join(x[1], x[3]))
    return tl.reshape(joined, (x[0].shape[0], 4))


@triton.jit
def tile8(x):
    """``[B, 8]`` of eight vectors."""
    joined = tl.join(tile4((x[0], x[2], x[4], x[6])), tile4((x[1], x[3], x[5], x[7])))
    return tl.reshape(joined, (x[0].shape[0], 8))


@triton.jit
def tile16(x):
    """``[B, 16]`` of sixteen vectors."""
    even = tile8((x[0], x[2], x[4], x[6], x[8], x[10], x[12], x[14]))
    odd = tile8((x[1], x[3], x[5], x[7], x[9], x[11], x[13], x[15]))
    return tl.reshape(tl.join(even, odd), (x[0].shape[0], 16))


@triton.jit
def swizzled(row, column, columns):
    """Where the scale of a row and block lies; ``columns``: blocks of a row. See ``reference.swizzled_offset``."""
    tile = (row >> 7).to(tl.int64) * tl.cdiv(columns, 4) + (column >> 2)
    return tile * 512 + ((row & 31) * 16 + ((row >> 5) & 3) * 4 + (column & 3))


@triton.jit
def tile_in_stack(height, width):
    """Row and column of a program's tile among ``height · width`` tiles of a matrix, and the matrix, int64, in a stack.

    Programs follow each other down a column of tiles, to the next column, and to the next matrix.
    """
    column = tl.program_id(0) // height
    return tl.program_id(0) % height, column % width, (column // width).to(tl.int64)


@triton.jit
def opaque(tile):
    """An int32 tile as it is: its parts stay in the threads that made them, and only the whole changes place."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [tile], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def after(x, other):
    """fp32 ``x`` as it is, once ``other`` is known: what follows is not begun beforehand, at the price of registers."""
    if INTERPRETED:
        return x
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f,f", [x, other], dtype=tl.float32, is_pure=True,
                                         pack=1)


@triton.jit
def load4(pointers, valid):
    """Four vectors of 32-bit words at each 16-byte aligned pointer, 0 where not ``valid``; never in the interpreter."""
    return tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        setp.ne.b32 p, $5, 0;
        mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;
        @p ld.global.v4.b32 {$0, $1, $2, $3}, [$4];
        }""", "=&r,=&r,=&r,=&r,l,r", [pointers.to(tl.int64), valid.to(tl.int32)],
        dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32), is_pure=False, pack=1)


@triton.jit
def store4(pointers, x, valid):
    """Four int32 vectors to the four words at each 16-byte aligned int32 pointer."""
    if INTERPRETED:
        tl.store(pointers[:, None] + tl.arange(0, 4)[None, :], tile4(x), mask=valid[:, None])
    else:
        tl.inline_asm_elementwise(
            """{
            .reg .pred p;
            setp.ne.b32 p, $6, 0;
            @p st.global.v4.b32 [$1], {$2, $3, $4, $5};
            mov.b32 $0, 0;
            }""", "=r,l,r,r,r,r,r", [pointers.to(tl.int64), x[0], x[1], x[2], x[3], valid.to(tl.int32)],
            dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def store2(pointers, x, valid):
    """Two int32 vectors to the two words at each 8-byte aligned int32 pointer."""
    if INTERPRETED:
        for k in tl.static_range(2):
            tl.store(pointers + k, x[k], mask=valid)
    else:
        tl.inline_asm_elementwise(
            """{
            .reg .pred p;
            setp.ne.b32 p, $4, 0;
            @p st.global.v2.b32 [$1], {$2, $3};
            mov.b32 $0, 0;
            }""", "=r,l,r,r,r", [pointers.to(tl.int64), x[0], x[1], valid.to(tl.int32)], dtype=tl.int32, is_pure=False,
            pack=1)


@triton.jit
def store_where_made(pointers, values, valid):
    """Numbers of 8 or 32 bits from all threads that have them: nothing changes place so that each is stored once."""
    SIZE: tl.constexpr = values.dtype.primitive_bitwidth
    if INTERPRETED:
        tl.store(pointers, values, mask=valid)
    else:
        bits = values.to(tl.int32, bitcast=True) if SIZE == 32 else values.to(tl.int32)
        tl.inline_asm_elementwise(
            f"{{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.global.b{SIZE} [$1], $2; mov.b32 $0, 0; }}", "=r,l,r,r",
            [pointers.to(tl.int64), bits, valid.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def load2(pointers, valid):
    """Two vectors of the int32 words at each 8-byte aligned int32 pointer, 0 where not ``valid``."""
    if INTERPRETED:
        return tl.load(pointers, mask=valid, other=0), tl.load(pointers + 1, mask=valid, other=0)
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .pred p;
            setp.ne.b32 p, $3, 0;
            mov.b32 $0, 0; mov.b32 $1, 0;
            @p ld.global.v2.b32 {$0, $1}, [$2];
            }""", "=&r,=&r,l,r", [pointers.to(tl.int64), valid.to(tl.int32)], dtype=(tl.int32, tl.int32),
            is_pure=True, pack=1)


@triton.jit
def load_down(pointers, stride, limit, N: tl.constexpr, ALL: tl.constexpr):
    """N vectors: the word or byte at each int32 or uint8 pointer, and ``stride`` of them further every time, as int32.

    0 from the ``limit``-th on; ALL says that no lane has such a limit. ``stride`` is below 2^32.
    """
    SIZE: tl.constexpr = pointers.dtype.element_ty.primitive_bitwidth // 8
    x = ()
    if INTERPRETED:
        for i in tl.static_range(N):
            x = x + (tl.load(pointers + i * stride.to(tl.int64), mask=i < limit, other=0).to(tl.int32),)
    else:
        at, step = pointers.to(tl.int64), tl.full(limit.shape, 0, tl.uint32) + stride.to(tl.uint32)
        for i in tl.static_range(N):
            x = x + (tl.inline_asm_elementwise(_load_asm(SIZE, ALL), "=&r,l,r,r",
                                               [at, tl.full(limit.shape, i, tl.int32), limit], dtype=tl.int32,
                                               is_pure=True, pack=1),)
            at = tl.inline_asm_elementwise(_next_asm(SIZE), "=l,l,r", [at, step], dtype=tl.int64, is_pure=True, pack=1)
    return x


@triton.constexpr_function
def _load_asm(size, all_):
    load = f"ld.global.{'b32' if size == 4 else 'u8'} $0, [$1];"
    return load if all_ else f"{{ .reg .pred p; setp.lt.s32 p, $2, $3; mov.b32 $0, 0; @p {load} }}"


@triton.constexpr_function
def _next_asm(size):
    return f"mad.wide.u32 $0, $2, {size}, $1;"


@triton.jit
def load_elements_down(pointers, stride, limit, N: tl.constexpr):
    """N vectors of fp32: the element of a 16- or 32-bit float type at each pointer, and ``stride`` further every time.

    0 from the ``limit``-th on. Any alignment, and any 64-bit stride.
    """
    TYPE: tl.constexpr = pointers.dtype.element_ty
    x = ()
    for i in tl.static_range(N):
        if INTERPRETED or TYPE.primitive_bitwidth != 16:
            x = x + (tl.load(pointers, mask=i < limit, other=0.0).to(tl.float32),)
        else:
            bits = tl.inline_asm_elementwise(
                """{
                .reg .pred p;
                .reg .b16 half;
                setp.lt.s32 p, $2, $3;
                mov.b16 half, 0;
                @p ld.global.b16 half, [$1];
                cvt.u32.u16 $0, half;
                }""", "=r,l,r,r", [pointers.to(tl.int64), tl.full(limit.shape, i, tl.int32), limit], dtype=tl.uint32,
                is_pure=True, pack=1)
            x = x + (half_to_float(bits, TYPE),)
        pointers += stride
    return x


@triton.jit
def load_fours(x, row, column, rows, cols, stride):
    """Four fp32 tiles of every fourth row: of the rows ``row``, of those behind them, and so on; 0 from row ``rows``
    and from column ``cols`` on."""
    tiles = ()
    for k in tl.static_range(4):
        inside = (row + k < rows)[:, None] & (column < cols)[None, :]
        tile = tl.load(x + (row + k).to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0)
        tiles = tiles + (tile.to(tl.float32),)
    return tiles


@triton.jit
def column_of(words, c, N: tl.constexpr, TYPE: tl.constexpr):
    """fp32 of element ``c`` of those of the float type that each of N int32 words holds."""
    x = ()
    for i in tl.static_range(N):
        word = words[i].to(tl.uint32, bitcast=True)
        if TYPE.primitive_bitwidth == 32:
            x = x + (word.to(tl.float32, bitcast=True),)
        elif INTERPRETED or TYPE == tl.float16:
            x = x + (half_to_float(word >> (16 * c), TYPE),)
        else:
            x = x + (tl.inline_asm_elementwise("prmt.b32 $0, $1, 0, $2;", "=f,r,r",
                                               [word, tl.full(word.shape, 0x1044, tl.int32) + c * 0x2200],
                                               dtype=tl.float32, is_pure=True, pack=1),)
    return x


@triton.jit
def load_word(pointers, valid):
    """One 32-bit word at each int32 pointer, 0 where not ``valid``."""
    if INTERPRETED:
        return tl.load(pointers, mask=valid, other=0)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p ld.global.b32 $0, [$1]; }", "=&r,l,r",
            [pointers.to(tl.int64), valid.to(tl.int32)], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def load_byte(pointers, valid):
    """One byte at each uint8 pointer as int32, 0 where not ``valid``."""
    if INTERPRETED:
        return tl.load(pointers, mask=valid, other=0).to(tl.int32)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p ld.global.u8 $0, [$1]; }", "=&r,l,r",
            [pointers.to(tl.int64), valid.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def half_to_float(bits, TYPE: tl.constexpr):
    """fp32 of the bfloat16 or float16 in the low half of uint32 words."""
    if TYPE == tl.bfloat16:
        return (bits << 16).to(tl.float32, bitcast=True)
    else:
        return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def load_blocks(pointer, offsets, valid, limit, N: tl.constexpr, WIDE: tl.constexpr):
    """N contiguous elements at each offset, in fp32: N vectors; element i is 0 where ``i >= limit``.

    Where not ``valid`` the elements have no meaning. WIDE: offsets are multiples of 16 bytes, no valid block reaches
    its limit, and there is a block at the pointer, which is read where not ``valid``.
    """
    x = ()
    if WIDE and not INTERPRETED:
        TYPE: tl.constexpr = pointer.dtype.element_ty
        blocks = pointer + tl.where(valid, offsets, 0)
        for h in tl.static_range(N * TYPE.primitive_bitwidth // 128):
            words = load4(blocks + h * (128 // TYPE.primitive_bitwidth), valid | True)
            for k in tl.static_range(4):
                if TYPE.primitive_bitwidth == 32:
                    x = x + (words[k].to(tl.float32, bitcast=True),)
                elif TYPE == tl.bfloat16:
                    x = x + ((words[k] << 16).to(tl.float32, bitcast=True),
                             (words[k] & 0xFFFF0000).to(tl.float32, bitcast=True))
                else:
                    x = x + (half_to_float(words[k], TYPE), half_to_float(words[k] >> 16, TYPE))
    else:
        for h in tl.static_range(N // 8):
            at = h * 8 + tl.arange(0, 8)[None, :]
            x = x + columns8(tl.load(pointer + offsets[:, None] + at, mask=valid[:, None] & (at < limit[:, None]),
                                     other=0.0).to(tl.float32))
    return x


@triton.jit
def pair(a, b, TYPE: tl.constexpr):
    """int32 of two fp32 rounded to a 16-bit type, ``a`` in the low half."""
    if INTERPRETED:
        low, high = a.to(TYPE).to(tl.uint16, bitcast=True), b.to(TYPE).to(tl.uint16, bitcast=True)
        return (low.to(tl.uint32) | (high.to(tl.uint32) << 16)).to(tl.int32, bitcast=True)
    elif TYPE == tl.bfloat16:
        return tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [a, b], dtype=tl.int32,
                                         is_pure=True, pack=1)
    else:
        return tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [a, b], dtype=tl.int32,
                                         is_pure=True, pack=1)


@triton.jit
def store_blocks(pointer, offsets, x, valid, limit, N: tl.constexpr, WIDE: tl.constexpr):
    """The N fp32 vectors as elements of the pointer's type; the mirror of :func:`load_blocks`.

    What 64 bytes a thread would write in pieces goes through shared memory instead and leaves in whole lines.
    """
    TYPE: tl.constexpr = pointer.dtype.element_ty
    if WIDE and not INTERPRETED:
        words = ()
        if TYPE.primitive_bitwidth == 32:
            for i in tl.static_range(N):
                words = words + (x[i].to(tl.int32, bitcast=True),)
        else:
            for i in tl.static_range(N // 2):
                words = words + (pair(x[2 * i], x[2 * i + 1], TYPE),)
        target = (pointer + offsets).to(tl.pointer_type(tl.int32), bitcast=True)
        for h in tl.static_range(N * TYPE.primitive_bitwidth // 512):
            tl.store(target[:, None] + h * 16 + tl.arange(0, 16)[None, :],
                     opaque(tile16(words[h * 16:h * 16 + 16])), mask=valid[:, None])
    else:
        for i in tl.static_range(N):
            tl.store(pointer + offsets + i, x[i].to(TYPE), mask=valid & (i < limit))
