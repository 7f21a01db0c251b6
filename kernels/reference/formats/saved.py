"""Eight bits an element or fewer for what is kept between forward and backward and read by no product.

    e4m3    symmetric: scale = amax/448 in bfloat16, code = E4M3(x / scale)            COAT, arXiv 2410.19313
    uint8   asymmetric: scale = (max − min)/255 and min in fp32, code = ⌊(x − min)/scale + r⌋   Mesa, arXiv 2111.11124
    uint6   the same with 63 levels, four codes in three bytes     uint4   with 15, two codes a byte

Groups lie along the last axis; the last one of a row may be short, and ``ROW`` stands for one group a row. Quotients go
through float64, which rounds to the same fp32 number in eager and compiled code. A group with a NaN or an infinity
comes back as NaN throughout, and so does a group of integers whose range exceeds fp32. Codes of fewer than eight bits
lie in their bytes from the lowest bit on.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from quartet.kernels.reference.formats.elements import STEPS, fp8_encode
from quartet.kernels.reference.philox import random_bits

BITS = {"e4m3": 8, "uint8": 8, "uint6": 6, "uint4": 4}
SAVED_ELEMENTS = tuple(BITS)
ROW = 0  # as a group: all of the last axis
_E4M3_MAX = 448.0
_SMALLEST = 2.0**-126  # whose reciprocal is a number too


def _grouped(x: Tensor, group: int, fill: float) -> Tensor:
    """``[…, groups, group]``; a short last group is filled up."""
    if group == ROW:
        return x.unsqueeze(-2)
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


def packed_together(element: str) -> int:
    """How many codes share whole bytes, of which a row has to be a multiple."""
    return 8 // math.gcd(8, BITS[element])


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 ``[…, cols]`` → ``[…, cols · bits / 8]``, the codes of each group of bytes from the lowest bit on."""
    if bits == 8:
        return codes
    together = 8 // math.gcd(8, bits)
    parts = codes.to(torch.int32).reshape(*codes.shape[:-1], codes.shape[-1] // together, together)
    word = _joined(parts, bits)
    octets = torch.stack([word >> 8 * i & 255 for i in range(together * bits // 8)], -1)
    return octets.reshape(*codes.shape[:-1], codes.shape[-1] * bits // 8).to(torch.uint8)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`pack`."""
    if bits == 8:
        return packed
    together = 8 // math.gcd(8, bits)
    size = together * bits // 8
    octets = packed.to(torch.int32).reshape(*packed.shape[:-1], packed.shape[-1] // size, size)
    word = _joined(octets, 8)
    parts = torch.stack([(word >> bits * i & 2**bits - 1).to(torch.uint8) for i in range(together)], -1)
    return parts.reshape(*packed.shape[:-1], packed.shape[-1] * 8 // bits)


def _joined(parts: Tensor, bits: int) -> Tensor:
    """int32 ``[…, n]`` as numbers of ``n · bits`` bits."""
    word = parts[..., 0]
    for i in range(1, parts.shape[-1]):
        word = word | parts[..., i] << bits * i
    return word


def encode_saved(x: Tensor, element: str, group: int, seed: Tensor | None = None, site: int = 0,
                 random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales of a tensor of one or more axes.

    Args:
        x: any float dtype ``[…, cols]``; computed in fp32. cols is a multiple of ``packed_together(element)``.
        element: one of ``SAVED_ELEMENTS``. group: elements along the last axis that share a scale, a multiple of 16,
            or of E4M3 ``ROW``.
        seed: int64 with one element: integers are rounded stochastically with the bits of ``site``; None rounds to
            nearest, ties to even. E4M3 codes are always rounded to nearest.
        random: those bits, 0…511 in any integer dtype ``[rows, padded cols]``, where the caller has them already.
    Returns:
        codes float8_e4m3fn ``[…, cols]`` or uint8 ``[…, cols · bits / 8]``; scales bfloat16 ``[…, groups]``, of
        integers fp32 ``[…, groups, 2]``: scale and minimum.
    """
    cols, x = x.shape[-1], x.to(torch.float32)
    if element == "e4m3":
        blocks = _grouped(x, group, 0.0)
        amax = blocks.abs().amax(-1)
        scale = (amax * (1.0 / _E4M3_MAX)).clamp(min=_SMALLEST)
        scale = torch.where(amax == 0, 1.0, torch.where(torch.isfinite(amax), scale, float("nan"))).to(torch.bfloat16)
        multiplier = _reciprocal(scale).unsqueeze(-1)
        return _flat(fp8_encode(blocks * multiplier, "e4m3"), cols).contiguous(), scale
    levels = 2.0 ** BITS[element] - 1
    low, high = (_grouped(x, group, fill) for fill in (float("inf"), -float("inf")))
    least, span = low.amin(-1), high.amax(-1) - low.amin(-1)
    scale = (span * (1.0 / levels)).clamp(min=_SMALLEST)
    scale = torch.where(span == 0, 1.0, torch.where(torch.isfinite(span), scale, float("nan")))
    index = (_grouped(x, group, 0.0) - least.unsqueeze(-1)) * _reciprocal(scale).unsqueeze(-1)
    index = torch.where(torch.isfinite(index), index, 0.0).clamp(0.0, levels)
    if seed is None and random is None:
        index = index.round()
    else:
        if random is None:
            assert seed is not None
            padded = index.shape[-2] * group
            random = random_bits(seed, site, index.numel() // padded, padded)
        steps = (index * STEPS).round() + random.reshape(index.shape).to(torch.float32)
        index = (steps * (1.0 / STEPS)).floor()
    codes = pack(_flat(index.to(torch.uint8), cols), BITS[element])
    return codes.contiguous(), torch.stack((scale, least), -1)


def decode_saved(codes: Tensor, scales: Tensor, element: str, group: int, dtype: torch.dtype) -> Tensor:
    """The values of codes of :func:`encode_saved`, ``[…, cols]`` in ``dtype``, computed in fp32."""
    codes = codes if element == "e4m3" else unpack(codes, BITS[element])
    cols = codes.shape[-1]
    blocks = _grouped(codes.to(torch.float32), group, 0.0)
    if element == "e4m3":
        values = blocks * scales.to(torch.float32).unsqueeze(-1)
    else:
        values = blocks * scales[..., 0:1] + scales[..., 1:2]
    return _flat(values, cols).to(dtype)


def groups_of(cols: Any, group: int) -> Any:
    """Groups of a row of ``cols``."""
    return 1 if group == ROW else (cols + group - 1) // group


def saved_bytes_per_element(element: str, group: int, cols: int) -> float:
    """Bytes that codes and scales take for each element of a row of ``cols``."""
    return BITS[element] / 8 + groups_of(cols, group) * (2 if element == "e4m3" else 8) / max(cols, 1)
