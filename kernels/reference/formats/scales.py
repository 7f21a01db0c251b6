"""Scale rules: those of E8M0 as integers from exponent bits, never log2 or exp2; fp32 ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quartet.kernels.reference.formats.elements import E8M0_NAN
from quartet.kernels.reference.hadamard import pad_last
from quartet.kernels.spec import QuantSpec

QUEST_CLIP = 2.92247856 / 6.0  # Gaussian-MSE-optimal clip over the largest E2M1 value
QUEST_FLOOR = 1e-8
ABSMEAN_FLOOR = 1e-5
APART = 4  # fp32 numbers from a scale to the next in a table: cuBLASLt takes scales at multiples of 16 bytes
_SEVEN_MANTISSA = 0x600000  # of 7 = 1.75 · 2²
_SQRT2_MANTISSA = 0x3504F4  # first fp32 significand above √2
_MANTISSA = 0x7FFFFF
_ONE_BYTE = 127
_LARGEST_MULTIPLIER = 2.0**126  # its reciprocal is a normal number
_SIGN_AND_EXPONENT = -(1 << 23)


def tree_sum(x: Tensor) -> Tensor:
    """Sum of the last axis (a power of two long), first half plus second half, repeatedly: a fixed order."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x.squeeze(-1)


def _exponent_and_mantissa(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of a non-negative fp32: unbiased floor(log2 x) and the 23 significand bits, subnormals normalised."""
    small = x < 2.0**-126
    bits = torch.where(small, x * 2.0**64, x).view(torch.int32)
    exponent = (bits >> 23) - 127 - small.to(torch.int32) * 64
    return exponent, bits & _MANTISSA


def _quest_byte(blocks: Tensor, amax: Tensor, spec: QuantSpec) -> Tensor:
    n = blocks.shape[-1]
    huge = amax >= 2.0**60  # the sum of 128 squares stays below 2^128
    down, up = torch.where(huge, 2.0**-96, 1.0), torch.where(huge, 2.0**96, 1.0)
    x = blocks * down.unsqueeze(-1)
    square = tree_sum(x * x) * (1.0 / n)
    if spec.sigma == "rms":
        variance = square
    else:
        mean = tree_sum(x) * (1.0 / n)
        floor = square * (1.0 / 16.0) if spec.sigma == "guarded" else torch.zeros_like(square)
        variance = torch.maximum(square - mean * mean, floor)
    target = torch.sqrt(variance) * QUEST_CLIP * up + QUEST_FLOOR
    exponent, mantissa = _exponent_and_mantissa(target)
    if spec.power == "nearest":
        exponent = exponent + (mantissa >= _SQRT2_MANTISSA).to(torch.int32)
    return exponent + 127


def e8m0_scale(blocks: Tensor, spec: QuantSpec) -> Tensor:
    """Scale bytes of fp32 ``[..., block]``, uint8 ``[...]``, by ``quartet.kernels.spec.RULES_OF_SCALE["e8m0"]``.

    The 4/3 of ``headroom`` is no power of two and stays out of the byte. ``even`` puts a/scale into [3.5, 7): what is
    above 6 becomes 6, as rounding to nearest would have it if E2M1 went on to 8. ``quest`` clips with the least error
    for a Gaussian.

    An all-zero block gets byte 127 (scale 1); a block with a NaN or an infinity gets 255 (NaN).
    """
    amax = blocks.abs().amax(-1)
    if spec.rule == "quest":
        byte = _quest_byte(blocks, amax, spec)
    else:
        exponent, mantissa = _exponent_and_mantissa(amax)
        emax = spec.format.emax
        assert emax is not None
        byte = exponent - emax + 127
        if spec.rule == "ceil":
            significand = spec.max / 2.0**emax
            byte = byte + (mantissa > int((significand - 1.0) * 2**23)).to(torch.int32)
        elif spec.rule == "even":
            byte = byte + (mantissa >= _SEVEN_MANTISSA).to(torch.int32)
    byte = byte.clamp(0, 254)
    byte = torch.where(amax == 0, _ONE_BYTE, byte)
    return torch.where(torch.isfinite(amax), byte, E8M0_NAN).to(torch.uint8)


def group_amax(blocks: Tensor, spec: QuantSpec) -> Tensor:
    """Largest magnitude under each scale of ``[rows, blocks, block]``: ``[rows, blocks]``, of tiles
    ``[⌈rows/block⌉, blocks]``. NaN where there is one."""
    amax = blocks.abs().amax(-1)
    if not spec.tile:
        return amax
    amax = pad_last(amax.t(), spec.block)
    return amax.reshape(amax.shape[0], amax.shape[1] // spec.block, spec.block).amax(-1).t().contiguous()


def spread(scales: Tensor, spec: QuantSpec, rows: Any) -> Tensor:
    """Scales of tiles repeated for each of their ``rows``; others as they are."""
    return scales.repeat_interleave(spec.block, 0)[:rows] if spec.tile else scales


def fp32_scale(x: Tensor, spec: QuantSpec, amax: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(multiplier, scale) of a row, a tensor, a block or a tile: codes are ``x · multiplier``, values ``code · scale``.

    multiplier = max / amax, correctly rounded to fp32, at most 2^126, and 1 where amax is 0; ``amax_pow2`` clears its
    significand. ``absmean``: 1 / max(mean |x|, 10⁻⁵). scale = 1 / multiplier, correctly rounded. A NaN or an infinity
    makes both NaN. Quotients go through float64, which rounds to the same fp32 number: compiled code divides fp32 only
    approximately on a GPU. The mean is summed in float64, so that its order does not show.

    Args:
        x: ``[rows, cols]`` with at least one element; for blocks and tiles fp32 ``[rows, blocks, block]``.
        amax: the largest magnitude that ``delayed`` takes, fp32 with one element.
    Returns:
        fp32 ``[1, 1]`` of a tensor, ``[rows, 1]`` of rows, ``[rows, blocks]`` or ``[⌈rows/block⌉, blocks]`` of tiles.
    """
    if spec.rule == "absmean":
        return _absmean_scale(x)
    if spec.rule == "delayed":
        assert amax is not None
        amax = amax.reshape(1, 1).to(torch.float32)
    elif spec.blocked:
        amax = group_amax(x, spec)
    else:
        amax = x.abs().amax((0, 1) if spec.block == "tensor" else (1,), keepdim=True).to(torch.float32)
    return scale_of_amax(amax, spec)


def scale_of_amax(amax: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """:func:`fp32_scale` of whatever has these largest magnitudes, fp32 of any shape, element by element."""
    multiplier = amax.to(torch.float64).reciprocal() * spec.max
    multiplier = multiplier.clamp(max=_LARGEST_MULTIPLIER).to(torch.float32)
    if spec.rule == "amax_pow2":
        multiplier = (multiplier.view(torch.int32) & _SIGN_AND_EXPONENT).view(torch.float32)
    multiplier = torch.where(amax == 0, 1.0, multiplier)
    multiplier = torch.where(amax < float("inf"), multiplier, float("nan"))
    return multiplier, multiplier.to(torch.float64).reciprocal().to(torch.float32)


def _absmean_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.to(torch.float64).abs().mean((0, 1), keepdim=True).to(torch.float32)
    mean = torch.where(mean < float("inf"), mean, float("nan")).clamp(min=ABSMEAN_FLOOR)
    multiplier = mean.to(torch.float64).reciprocal().to(torch.float32)
    return multiplier, multiplier.to(torch.float64).reciprocal().to(torch.float32)
