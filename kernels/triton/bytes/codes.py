"""Device functions of codes of one byte, of values that are multiplied by their scale already."""

from __future__ import annotations

import triton
import triton.language as tl

from quartet.kernels.triton.optim.codes import fp8_encode

_ROUND = tl.constexpr(1.5 * 2.0**23)  # added to a small number it leaves the nearest integer, to even, in the low bits


@triton.jit
def encode(scaled, ELEMENT: tl.constexpr, HARDWARE: tl.constexpr):
    """uint8 tile of FP8 codes, to nearest even and saturating; of INT8 codes of values that round to ±127 at most, 0 of
    NaN."""
    if ELEMENT == "int8":
        rounded = (scaled + _ROUND).to(tl.int32, bitcast=True)
        return tl.where(scaled == scaled, rounded, 0).to(tl.uint8)
    elif HARDWARE:
        return tl.inline_asm_elementwise(_conversions(ELEMENT), "=r,f,f,f,f", [scaled], dtype=tl.uint8, is_pure=True,
                                         pack=4)
    else:
        return fp8_encode(scaled, ELEMENT, False)


@triton.jit
def fp8_words(tiles, ELEMENT: tl.constexpr, HARDWARE: tl.constexpr):
    """int32 of the FP8 codes of four tiles, to nearest even and saturating, the first tile's in the low byte."""
    if HARDWARE:
        return tl.inline_asm_elementwise(
            _conversions(ELEMENT), "=r,f,f,f,f", [tiles[0], tiles[1], tiles[2], tiles[3]], dtype=tl.int32, is_pure=True,
            pack=1)
    else:
        words = fp8_encode(tiles[0], ELEMENT, False).to(tl.int32)
        for k in tl.static_range(1, 4):
            words = words | (fp8_encode(tiles[k], ELEMENT, False).to(tl.int32) << (8 * k))
        return words


@triton.constexpr_function
def _conversions(element):
    """The first operand of a conversion goes to the high byte."""
    convert = f"cvt.rn.satfinite.{element}x2.f32"
    return f"{{ .reg .b16 low, high; {convert} low, $2, $1; {convert} high, $4, $3; mov.b32 $0, {{low, high}}; }}"
