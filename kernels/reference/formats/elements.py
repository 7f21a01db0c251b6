"""Element and scale formats: E2M1, E4M3, E5M2 values and their codes, E8M0 bytes.

E2M1 rests on one fact: as a function of the magnitude index i = 0…7 the value is
``max(i/2, i − 2, 2i − 8)``, so the inverse is a minimum of three lines, and each of the lines can be
rounded on its own without error: to whole indices, or to fixed point.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quartet.kernels.element import ELEMENTS, encode

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E8M0_NAN = 255
STEPS = 512  # from one E2M1 value to the next, as stochastic rounding sees them


def e2m1_encode(x: Tensor, random: Tensor | None = None) -> Tensor:
    """Codes 0…15 (uint8; bit 3 is the sign) of fp32 values, saturating at ±6.

    ``random`` None: to nearest, ties to even code. Else nine random bits r = 0…511 an element: the index in fixed
    point of nine fraction bits i₉, to nearest even, becomes ``⌊(i₉ + r) / 512⌋``. So the magnitude goes up with
    probability ``i₉/512 − ⌊i₉/512⌋``, which is (x − lo)/(hi − lo) to half a 512th; an exact value stays. i₉ is also
    the bits of ``float16(|x| · 2^-14)``: to the end of the subnormals and from there on its spacing doubles as E2M1's.
    """
    a = x.abs().clamp(max=6.0)
    if random is None:
        index = _index(a, 1)
    else:
        index = ((_index(a, STEPS) + random.to(torch.float32)) * (1.0 / STEPS)).floor()
    sign = torch.signbit(x).to(torch.uint8)
    return index.to(torch.uint8) | (sign << 3)


def _index(a: Tensor, steps: int) -> Tensor:
    """``steps`` times the index 0…7 of magnitudes up to 6, rounded to nearest even."""
    near, middle, far = (a * (2.0 * steps)).round(), (a * steps).round(), (a * (0.5 * steps)).round()
    return torch.minimum(torch.minimum(near, middle + 2 * steps), far + 4 * steps)


def e2m1_decode(codes: Tensor) -> Tensor:
    """fp32 values of E2M1 codes 0…15."""
    i = (codes & 7).to(torch.float32)
    value = torch.maximum(torch.maximum(i * 0.5, i - 2), 2 * i - 8)
    return torch.where((codes & 8) != 0, -value, value)


def fp8_encode(x: Tensor, element: str) -> Tensor:
    """fp32 → ``torch.float8_*`` to nearest even, saturating; NaN stays NaN."""
    return encode(x, ELEMENTS[element])


def e8m0_decode(scale: Tensor) -> Tensor:
    """fp32 2^(byte − 127) from uint8 bytes; 255 is NaN, 0 is the subnormal 2^−127."""
    byte = scale.to(torch.int32)
    bits = torch.where(byte == 0, torch.full_like(byte, 1 << 22), byte << 23)
    bits = torch.where(byte == E8M0_NAN, torch.full_like(byte, 0x7FC00000), bits)
    return bits.view(torch.float32)


def e8m0_reciprocal(scale: Tensor) -> Tensor:
    """fp32 2^(127 − byte) for bytes 0…253 (no subnormals); 254 and 255 give 2^−127 and NaN."""
    return e8m0_decode(torch.where(scale == E8M0_NAN, scale, 254 - scale))
