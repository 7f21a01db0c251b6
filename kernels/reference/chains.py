"""What fused kernels compute, written as the ops that they fuse.

    rotate_quantize   hadamard → quantize
    requantize        dequantize → transpose → hadamard → quantize
    unrotate          × gain → apply_mask → inverse hadamard → first columns
    fold              MXFP4 rows → E4M3 rows with one power-of-two scale, or one for the part of each group
"""

from __future__ import annotations

import torch
from torch import Tensor

from quartet.kernels.reference.formats.elements import e2m1_decode, e8m0_decode
from quartet.kernels.reference.formats.nvfp4 import quantize_encoded
from quartet.kernels.reference.formats.packing import unpack_nibbles
from quartet.kernels.reference.hadamard import hadamard, pad_last
from quartet.kernels.reference.philox import random_bits
from quartet.kernels.reference.quantize import apply_mask, inner, quantize, random_shape
from quartet.kernels.spec import QuantSpec

Two = tuple[Tensor, Tensor]
Three = tuple[Tensor, Tensor, Tensor]
_TOP, _LOWEST = 6, -24  # powers of two between a row's scale and its blocks': of the largest, and of all that vanish


def rotate_quantize(x: Tensor, rotation: int, signs: Tensor | None, spec: QuantSpec, seed: Tensor | None, site: int,
                    encode: Tensor | None = None) -> Three:
    """Codes, scales and mask of ``[R, K]`` after a Hadamard, of none where ``rotation`` is 0.

    ``encode``: the tensor's multiplier of ``nvfp4.tensor_scales``, with E4M3 scales.
    """
    values = hadamard(x, rotation, signs) if rotation else x.to(torch.float32)
    if encode is None:
        codes, scales, mask = quantize(values, spec, seed, site)
        return codes.contiguous(), scales.contiguous(), mask.contiguous()
    values = pad_last(values, spec.multiple)
    random = None
    if seed is not None and spec.stochastic:
        random = random_bits(seed, site, *random_shape(spec, *values.shape))
    codes, scales = quantize_encoded(values, spec, encode, random, lambda kept: kept)
    return codes.contiguous(), scales.contiguous(), codes.new_empty(0)


def unscaled(codes: Tensor, scales: Tensor, spec: QuantSpec, dtype: torch.dtype = torch.float32) -> Tensor:
    """``code · scale`` of blocks, without a gain and without the factor of the tensor."""
    return inner(codes, scales, spec, dtype, unpack_nibbles).contiguous()


def requantize(codes: Tensor, scales: Tensor, in_spec: QuantSpec, rotation: int, signs: Tensor | None, spec: QuantSpec,
               seed: Tensor | None, site: int, matrices: int = 1) -> Three:
    """:func:`rotate_quantize` of the transpose of each of ``matrices`` that lie below each other, ``in_spec`` of which
    has no gain."""
    values = unscaled(codes, scales, in_spec)
    turned = values.reshape(matrices, -1, values.shape[1]).transpose(1, 2).reshape(matrices * values.shape[1], -1)
    return rotate_quantize(turned, rotation, signs, spec, seed, site)


def unrotate(x: Tensor, mask: Tensor | None, rotation: int, signs: Tensor | None, gain: float, cols: int,
             dtype: torch.dtype) -> Tensor:
    """The first ``cols`` columns of what a rotated product was made from, times ``gain``."""
    y = x.to(torch.float32) * gain
    y = y if mask is None else apply_mask(y, mask)
    y = hadamard(y, rotation, signs, True, dtype) if rotation else y.to(dtype)
    return y[:, :cols].contiguous()


def fold(codes: Tensor, scales: Tensor, spec: QuantSpec, ends: Tensor | None = None) -> Two:
    """float8_e4m3fn ``[R, K]`` and fp32 scales ``[R, 1]``, ``values · scale = code · 2^e``; with ``ends`` ``[R, E]``.

    E2M1 · 2^d is exact in E4M3 for −8 ≤ d ≤ 6, so the largest block of a row is put at d = 6. A scale for zeros only
    has no meaning.
    """
    values = e2m1_decode(unpack_nibbles(codes))
    rows, cols = values.shape
    blocks = values.reshape(rows, cols // spec.block, spec.block)
    byte = scales.to(torch.int32)
    counted = torch.where((blocks == 0).all(-1) | (byte == 255), 0, byte)
    at, groups = _group_of_block(byte.shape[1], int(spec.block), ends, codes.device)
    top = counted.new_zeros(rows, groups).scatter_reduce_(1, at.expand(rows, -1), counted, "amax")
    row = (top - _TOP).clamp(min=1)
    power = e8m0_decode(((byte - row.gather(1, at.expand(rows, -1))).clamp(_LOWEST, _TOP) + 127).to(torch.uint8))
    power = torch.where(byte == 255, float("nan"), power)
    folded = (blocks * power.unsqueeze(-1)).to(torch.float8_e4m3fn).reshape(rows, cols)
    return folded, e8m0_decode(row.to(torch.uint8))


def _group_of_block(blocks: int, size: int, ends: Tensor | None, device: torch.device) -> tuple[Tensor, int]:
    """int64 ``[1, blocks]``, and how many groups there are; blocks behind the last end are of the last group."""
    starts = torch.arange(blocks, device=device) * size
    if ends is None:
        return torch.zeros_like(starts).unsqueeze(0), 1
    groups = ends.shape[0]
    return torch.searchsorted(ends.to(starts.dtype), starts, right=True).clamp(max=groups - 1).unsqueeze(0), groups
