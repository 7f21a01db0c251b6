"""Eight bits an element for what is kept between forward and backward and read by no product.

    e4m3    symmetric: scale = amax/448 in bfloat16, code = E4M3(x / scale)            COAT, arXiv 2410.19313
    uint8   asymmetric: scale = (max − min)/255 and min in fp32, code = ⌊(x − min)/scale + r⌋   Mesa, arXiv 2111.11124

Groups lie along the last axis; the last one of a row may be short. Quotients go through float64, which rounds to the
same fp32 number in eager and compiled code. A group with a NaN or an infinity comes back as NaN throughout, and so
does a uint8 group whose range exceeds fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quartet.kernels.reference.formats.elements import STEPS, fp8_encode
from quartet.kernels.reference.philox import random_bits

SAVED_ELEMENTS = ("e4m3", "uint8")
_E4M3_MAX = 448.0
_LEVELS = 255.0
_SMALLEST = 2.0**-126  # whose reciprocal is a number too


def _grouped(x: Tensor, group: int, fill: float) -> Tensor:
    """``[…, groups, group]``; a short last group is filled up."""
    extra = -x.shape[-1] % group
    if not (isinstance(extra, int) and extra == 0):
        x = torch.nn.functional.pad(x, (0, extra), value=fill)
    return x.reshape(*x.shape[:-1], x.shape[-1] // group, group)


def _flat(groups: Tensor, cols: Any) -> Tensor:
    """The inverse of ``_grouped``."""
    whole = groups.reshape(*groups.shape[:-2], groups.shape[-2] * groups.shape[-1])
    return whole if isinstance(cols, int) and whole.shape[-1] == cols else whole[..., :cols]


def _reciprocal(x: Tensor) -> Tensor:
    return x.to(torch.float64).reciprocal().to(torch.float32)


def encode_saved(x: Tensor, element: str, group: int, seed: Tensor | None = None, site: int = 0,
                 random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales of a tensor of one or more axes.

    Args:
        x: any float dtype ``[…, cols]``; computed in fp32.
        element: one of ``SAVED_ELEMENTS``. group: elements along the last axis that share a scale, a multiple of 16.
        seed: int64 with one element: uint8 codes are rounded stochastically with the bits of ``site``; None rounds to
            nearest, ties to even. E4M3 codes are always rounded to nearest.
        random: those bits, 0…511 in any integer dtype ``[rows, padded cols]``, where the caller has them already.
    Returns:
        codes float8_e4m3fn or uint8 ``[…, cols]``; scales bfloat16 ``[…, ⌈cols/group⌉]``, of uint8 codes fp32
        ``[…, ⌈cols/group⌉, 2]``: scale and minimum.
    """
    cols, x = x.shape[-1], x.to(torch.float32)
    if element == "e4m3":
        blocks = _grouped(x, group, 0.0)
        amax = blocks.abs().amax(-1)
        scale = (amax * (1.0 / _E4M3_MAX)).clamp(min=_SMALLEST)
        scale = torch.where(amax == 0, 1.0, torch.where(torch.isfinite(amax), scale, float("nan"))).to(torch.bfloat16)
        multiplier = _reciprocal(scale).unsqueeze(-1)
        return _flat(fp8_encode(blocks * multiplier, "e4m3"), cols).contiguous(), scale
    low, high = (_grouped(x, group, fill) for fill in (float("inf"), -float("inf")))
    least, span = low.amin(-1), high.amax(-1) - low.amin(-1)
    scale = (span * (1.0 / _LEVELS)).clamp(min=_SMALLEST)
    scale = torch.where(span == 0, 1.0, torch.where(torch.isfinite(span), scale, float("nan")))
    index = (_grouped(x, group, 0.0) - least.unsqueeze(-1)) * _reciprocal(scale).unsqueeze(-1)
    index = torch.where(torch.isfinite(index), index, 0.0).clamp(0.0, _LEVELS)
    if seed is None and random is None:
        index = index.round()
    else:
        if random is None:
            assert seed is not None
            padded = index.shape[-2] * group
            random = random_bits(seed, site, index.numel() // padded, padded)
        steps = (index * STEPS).round() + random.reshape(index.shape).to(torch.float32)
        index = (steps * (1.0 / STEPS)).floor()
    return _flat(index.to(torch.uint8), cols).contiguous(), torch.stack((scale, least), -1)


def decode_saved(codes: Tensor, scales: Tensor, element: str, group: int, dtype: torch.dtype) -> Tensor:
    """The values of codes of :func:`encode_saved`, ``[…, cols]`` in ``dtype``, computed in fp32."""
    cols = codes.shape[-1]
    blocks = _grouped(codes.to(torch.float32), group, 0.0)
    if element == "e4m3":
        values = blocks * scales.to(torch.float32).unsqueeze(-1)
    else:
        values = blocks * scales[..., 0:1] + scales[..., 1:2]
    return _flat(values, cols).to(dtype)


def saved_bytes_per_element(element: str, group: int, cols: int) -> float:
    """Bytes that codes and scales take for each element of a row of ``cols``."""
    return 1.0 + -(-cols // group) * (2 if element == "e4m3" else 8) / max(cols, 1)
