"""Codes and scales of optimizer states: the specification, in fp32 tensor arithmetic with no fused multiply-add.

States are processed as tiles ``[n, B]`` of fp32 values: B consecutive elements of a row (:class:`Layout`), zero where
the row ends. Encoding rounds to nearest even and saturates; a NaN stays one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from quartet.kernels.reference.formats.elements import fp8_encode
from quartet.kernels.reference.optim.state_format import LARGEST, StateFormat

SMALLEST = 2.0**-126  # below this nothing is a scale, and range expansion stores zero
_FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_NEEDS_SCALE = "a scale a tensor is given to encode"

# Range expansion. log2(1+f) = f·P(f) on [√½ − 1, √2 − 1], |error| < 3e-6; 2^f = 1 + f·Q(f) on [−½, ½], |error| < 4e-6.
SQRT2_BITS = 0x3FB504F3
LOG2_P = (1.4427134990692139, -0.7211331725120544, 0.47934460639953613, -0.3674626946449280, 0.3221827447414398,
          -0.2067354917526245)
EXP2_Q = (0.6931211352348328, 0.2402210384607315, 0.055921521037817, 0.00967814214527607)
EXPANDED_BITS = 16.614709844115207  # log2(448² / 2)
ROUND_MAGIC = 1.5 * 2**23
LOG2_448 = 8.807356834411621  # log2(448) as the polynomial gives it

# The dynamic map. Its magnitudes are 10^(i−6) · (0.9·s − 0.8), with s = (j + ½) / 2^e the significand of an integer j
# whose exponent e = i (signed) or i + 1 (unsigned) counts decades: i = 0…6.
POWERS = tuple(float(f"1e{i - 6}") for i in range(7))


class Layout(NamedTuple):
    """How a contiguous tensor falls into tiles: ``rows · width`` elements, each row padded to ``tiles`` tiles of B."""

    rows: int
    width: int
    tile: int

    @property
    def tiles(self) -> int:
        """Tiles of one row."""
        return -(-self.width // self.tile)

    @property
    def total(self) -> int:
        return self.rows * self.tiles

    def split(self, x: Tensor) -> Tensor:
        """fp32 ``[rows · tiles, B]``, with zeros past the end of each row."""
        x = x.reshape(self.rows, self.width).to(torch.float32)
        x = torch.nn.functional.pad(x, (0, self.tiles * self.tile - self.width))
        return x.reshape(self.total, self.tile)

    def join(self, tiles: Tensor) -> Tensor:
        """``[rows · width]`` of tiles, the inverse of :meth:`split`."""
        return tiles.reshape(self.rows, self.tiles * self.tile)[:, : self.width].reshape(-1)


def scale_shape(form: StateFormat, layout: Layout) -> tuple[int, ...] | None:
    """Shape of a state's fp32 scales: None for plain formats, ``[2]`` (scale, largest magnitude) for one a tensor,
    ``[rows, tiles]`` in blocks, and ``[rows, tiles, 2]`` (M, k) with range expansion."""
    if form.plain:
        return None
    if form.per_tensor:
        return (2,)
    return (layout.rows, layout.tiles, 2) if form.expand else (layout.rows, layout.tiles)


def code_dtype(form: StateFormat) -> torch.dtype:
    """What the codes are stored as: the number format itself, or uint8 for one-byte codes."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(form.element, torch.uint8)


def zero_code(form: StateFormat, signed: bool) -> int:
    """The code of zero: the dynamic map with a sign has it in the middle."""
    return 127 if form.element == "dynamic" and signed else 0


def tensor_scale(amax: Tensor, form: StateFormat) -> Tensor:
    """The one scale of a tensor from its largest magnitude, finite and positive: fp32 of the same shape.

    ``amax / 448`` or ``amax / 57344``, twice that if ``form.scaling`` is delayed; for ``fp16`` the power of two at
    or above ``amax``, times 2^−14. At least 2^−126.
    """
    if form.element == "fp16":
        power = (amax.view(torch.int32) + 0x7FFFFF) & -0x800000
        scale = power.view(torch.float32) * 2.0**-14
    else:
        scale = amax / target(form)
    return torch.where(scale < SMALLEST, SMALLEST, scale)


def target(form: StateFormat) -> float:
    """What the largest known magnitude is scaled to."""
    return LARGEST[form.element] * (0.5 if form.scaling == "delayed" else 1.0)


def decode(codes: Tensor, scale: Tensor | None, form: StateFormat, signed: bool) -> Tensor:
    """fp32 tiles of tiles of codes.

    Args:
        codes: ``[n, B]`` of :func:`code_dtype`.
        scale: fp32 ``[n, 1]`` (``[n, 2]`` expanded) for blocks, a scalar for one a tensor, None for plain formats.
        signed: whether the state takes both signs; the dynamic map has one for each case.
    """
    if form.plain:
        return codes.to(torch.float32)
    assert scale is not None
    if form.element == "fp16":
        return codes.to(torch.float32) * scale
    if form.element == "dynamic":
        return _dynamic_decode(codes, signed) * scale
    values = codes.view(_FP8[form.element]).to(torch.float32)
    return _expanded_decode(values, scale) if form.expand else values * scale


def encode(x: Tensor, form: StateFormat, signed: bool, scale: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Codes and scales of fp32 tiles; the inverse of :func:`decode`.

    Args:
        x: ``[n, B]``. scale: fp32 scalar, for one scale a tensor only.
    """
    if form.plain:
        return x.to(code_dtype(form)), None
    if form.per_tensor:
        assert scale is not None, _NEEDS_SCALE
        scaled = x * (1.0 / scale)
        if form.element == "fp16":
            return scaled.clamp(-LARGEST["fp16"], LARGEST["fp16"]).to(torch.float16), scale
        return fp8_encode(scaled, form.element).view(torch.uint8), scale
    amax = x.abs().amax(-1, keepdim=True)
    if form.expand:
        return _expanded_encode(x, amax)
    scale = amax if form.element == "dynamic" else amax / LARGEST[form.element]
    scale = torch.where(scale < SMALLEST, SMALLEST, scale)
    scaled = x * (1.0 / scale)
    if form.element == "dynamic":
        return _dynamic_encode(scaled, signed), scale
    return fp8_encode(scaled, form.element).view(torch.uint8), scale


# ---- range expansion ---------------------------------------------------------------------------------------------


def log2(x: Tensor) -> Tensor:
    """Base-2 logarithm of positive normal fp32 numbers by exponent bits and a polynomial."""
    bits = x.view(torch.int32)
    above = ((bits & 0x7FFFFF) | 0x3F800000) >= SQRT2_BITS
    exponent = (bits >> 23) - 127 + above.to(torch.int32)
    significand = (bits & 0x7FFFFF) | torch.where(above, 0x3F000000, 0x3F800000)
    f = significand.to(torch.int32).view(torch.float32) - 1.0
    p = f * LOG2_P[5] + LOG2_P[4]
    for c in LOG2_P[3::-1]:
        p = p * f + c
    return p * f + exponent.to(torch.float32)


def exp2(x: Tensor) -> Tensor:
    """2^x of fp32 numbers, −150 and below giving 0 and 128 and above not asked for."""
    x = torch.where(x < -150.0, -150.0, x)
    shifted = x + ROUND_MAGIC
    f = x - (shifted - ROUND_MAGIC)
    p = f * EXP2_Q[3] + EXP2_Q[2]
    for c in EXP2_Q[1::-1]:
        p = p * f + c
    p = p * f + 1.0
    n = shifted.view(torch.int32) - 0x4B400000
    half = n >> 1  # in two factors, so that neither leaves the range of fp32
    first = ((half + 127) << 23).view(torch.float32)
    return p * first * ((n - half + 127) << 23).view(torch.float32)


def _expanded_encode(x: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    a = x.abs()
    least = torch.where(a >= SMALLEST, a, float("inf")).amin(-1, keepdim=True)
    flat = (amax < SMALLEST) | ~(least < amax)  # all zero, constant, or not finite
    top = torch.where(flat & ~(amax >= SMALLEST) & (amax == amax), SMALLEST, amax)
    log_top = log2(torch.where(top < float("inf"), top, 1.0))
    log_least = log2(torch.where(flat, 1.0, least))
    span = torch.where(flat, 1.0, log_top - log_least)
    k = torch.floor(EXPANDED_BITS * 16.0 / span) * 0.0625
    k = torch.where(flat, 1.0, torch.where(k > 16.0, 16.0, torch.where(k < 0.0625, 0.0625, k)))
    log = log2(torch.where((a >= SMALLEST) & (a < float("inf")), a, 1.0))
    y = exp2((log - log_top) * k + LOG2_448)
    y = torch.where(a >= SMALLEST, y, 0.0)
    y = torch.where(a < float("inf"), y, float("nan"))
    codes = fp8_encode(torch.where(x < 0, -y, y), "e4m3").view(torch.uint8)
    return codes, torch.cat([top, k], -1)


def _expanded_decode(values: Tensor, scale: Tensor) -> Tensor:
    top, k = scale[:, :1], scale[:, 1:]
    a = values.abs()
    y = exp2((log2(torch.where(a > 0, a, 1.0)) - LOG2_448) * (1.0 / torch.where(k > 0, k, 1.0)))
    y = torch.where(a > 0, y, a)  # zero and NaN
    return torch.where(values < 0, -y, y) * top


# ---- the dynamic map ---------------------------------------------------------------------------------------------


def _fp32(x: float) -> float:
    return torch.tensor(x, dtype=torch.float32, device="cpu").item()


def _midpoints(signed: bool) -> tuple[float, ...]:
    """Between zero and the least magnitude, then between the top of each decade and the next; the last one below 1."""
    first = 0 if signed else 1

    def value(decade: int, significand: float) -> float:
        return 10.0 ** (decade - 6) * (0.9 * significand - 0.8)

    bottoms = [value(i, 1 + 0.5 / 2 ** (i + first)) for i in range(7)] + [1.0]
    tops = [0.0] + [value(i, 2 - 0.5 / 2 ** (i + first)) for i in range(7)]
    return tuple(_fp32((low + high) / 2) for low, high in zip(tops, bottoms, strict=True))


MIDPOINTS = {True: _midpoints(True), False: _midpoints(False)}
INVERSES = tuple(_fp32(10.0 ** (6 - i) / 0.9) for i in range(7))
SHIFT = _fp32(0.8 / 0.9)
TOP_SIGNIFICAND = 2.0 - 2.0**-10


def _dynamic_decode(codes: Tensor, signed: bool) -> Tensor:
    first = 0 if signed else 1
    code = codes.to(torch.int32)
    j = (code - 127).abs() if signed else torch.where(code == 0, 0, code + 1)
    bits = (j.to(torch.float32) + 0.5).view(torch.int32)
    s = ((bits & 0x7FFFFF) | 0x3F800000).view(torch.float32)
    power = torch.full_like(s, POWERS[0])
    for i in range(1, 7):
        power = torch.where(j >= 2 ** (i + first), POWERS[i], power)
    value = (s * 0.9 - 0.8) * power
    value = torch.where(j >= 2 ** (7 + first), 1.0, torch.where(j == 0, 0.0, value))
    return torch.where(code < 127, -value, value) if signed else value


def _dynamic_encode(x: Tensor, signed: bool) -> Tensor:
    first, middle = (0 if signed else 1), MIDPOINTS[signed]
    a = x.abs()
    inverse = torch.full_like(a, INVERSES[0])
    exponent = torch.full_like(a, first, dtype=torch.int32)
    for i in range(1, 7):
        inverse = torch.where(a >= middle[i], INVERSES[i], inverse)
        exponent = torch.where(a >= middle[i], i + first, exponent)
    s = a * inverse + SHIFT
    s = torch.where(s < 1.0, 1.0, torch.where(s > TOP_SIGNIFICAND, TOP_SIGNIFICAND, s))
    j = ((s.view(torch.int32) & 0x7FFFFF) | 0x800000) >> (23 - exponent)
    j = torch.where(a >= middle[7], 2 ** (7 + first), torch.where(a >= middle[0], j, 0))
    if signed:
        code = torch.where(x < 0, 127 - torch.where(j > 127, 127, j), 127 + j)
    else:
        code = torch.where(j > 0, j - 1, 0)
    return code.to(torch.uint8)
