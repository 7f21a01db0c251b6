"""Quantise and dequantise 2-D tensors along the last (contraction) axis, and the product of two quantised ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quartet.kernels.reference.elements import (
    e2m1_decode,
    e2m1_encode,
    e8m0_decode,
    e8m0_reciprocal,
    fp8_encode,
)
from quartet.kernels.reference.hadamard import pad_last
from quartet.kernels.reference.packing import pack_bits, pack_nibbles, unpack_bits, unpack_nibbles
from quartet.kernels.reference.philox import random_bits
from quartet.kernels.reference.scales import e8m0_scale, fp32_scale
from quartet.kernels.spec import QuantSpec


def _as_is(x: Tensor) -> Tensor:
    return x


def quantize(x: Tensor, spec: QuantSpec, seed: Tensor | None = None, site: int = 0, random: Tensor | None = None,
             store: Callable[[Tensor], Tensor] = _as_is) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise ``[rows, cols]``, sharing scales in blocks along the last axis, in rows or in the whole tensor.

    Args:
        x: any float dtype; computed in fp32. ``cols`` is zero-padded to a multiple of the block.
        seed: int64 scalar tensor; needed when ``spec.stochastic``.
        site: which random bits of that seed (0…2^32−1).
        random: those bits, 0…511 in any integer dtype ``[rows, padded]``, where the caller has them already.
        store: returns its argument unchanged; applied to what a compiler should compute once and keep in
            memory: the blocks and what is packed from them ``[rows, blocks, …]``, and the scales and their
            reciprocals ``[rows, blocks]``, or what stands for these with fp32 scales.
    Returns:
        codes (uint8 ``[rows, padded/2]``, two E2M1 to a byte, or float8 ``[rows, padded]``),
        scales (uint8 E8M0 ``[rows, padded/block]``; fp32 ``[rows, 1]`` of rows, ``[1, 1]`` of a tensor) and, if
        ``spec.mask``, the packed bits of ``|x/scale| < max`` (uint8 ``[rows, padded/8]``), else an empty uint8 tensor.
    """
    if spec.stochastic and seed is None:
        raise ValueError(f"quantiser '{spec}' rounds stochastically and needs a seed")
    if not spec.blocked:
        multiplier, scales = map(store, fp32_scale(x, spec))
        codes = fp8_encode(x.to(torch.float32) * multiplier, spec.element).contiguous()
        return codes, scales, x.new_empty(0, dtype=torch.uint8)
    x = pad_last(x.to(torch.float32), spec.block)
    rows, cols = x.shape
    blocks = store(x.reshape(rows, cols // spec.block, spec.block))
    scales = store(e8m0_scale(blocks, spec))
    scaled = blocks * store(e8m0_reciprocal(scales)).unsqueeze(-1)
    if spec.rule == "headroom":
        scaled = scaled * 0.75
    if spec.element == "e2m1":
        if spec.stochastic and random is None and seed is not None:
            random = random_bits(seed, site, rows, cols)
        codes = store(pack_nibbles(e2m1_encode(scaled, None if random is None else random.reshape(blocks.shape))))
    else:
        codes = fp8_encode(scaled, spec.element)
    mask = x.new_empty(0, dtype=torch.uint8)
    if spec.mask:
        mask = store(pack_bits(scaled.abs() < spec.max)).reshape(rows, cols // 8)
    codes = codes.flatten(1)
    return codes, scales, mask


def dequantize(codes: Tensor, scales: Tensor, spec: QuantSpec, dtype: torch.dtype = torch.float32,
               unpack: Callable[[Tensor], Tensor] = unpack_nibbles) -> Tensor:
    """Values ``code · scale · gain`` of a quantised tensor, ``[rows, padded]`` of ``dtype``.

    What has a NaN scale (E8M0 byte 255) is NaN throughout. ``unpack``: another way to do ``unpack_nibbles``.
    """
    values = e2m1_decode(unpack(codes)) if spec.element == "e2m1" else codes.to(torch.float32)
    if not spec.blocked:
        return (values * scales).to(dtype)
    rows, cols = values.shape
    blocks = values.reshape(rows, cols // spec.block, spec.block) * e8m0_decode(scales).unsqueeze(-1)
    if spec.gain != 1.0:
        blocks = blocks * spec.gain
    return blocks.reshape(rows, cols).to(dtype)


def apply_mask(x: Tensor, mask: Tensor, unpack: Callable[[Tensor], Tensor] = unpack_bits) -> Tensor:
    """``x`` where the packed bit is set, else 0; ``x [rows, cols]``, ``mask [rows, cols/8]``."""
    return torch.where(unpack(mask), x, torch.zeros((), dtype=x.dtype, device=x.device))


def scaled_mm(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, a_spec: QuantSpec, b_spec: QuantSpec,
              dtype: torch.dtype = torch.float32, unpack: Callable[[Tensor], Tensor] = unpack_nibbles) -> Tensor:
    """``A · Bᵀ`` of two quantised tensors: ``[M, K] × [N, K] → [M, N]`` of ``dtype``.

    The product is of the values without gains and without the scales of rows and tensors, exact in bf16 and
    fp32 (fp16 lacks the range, so it is made from fp32), then multiplied by both gains and by those scales, A's first.
    Those scales are any fp32 numbers, so where there are some the product and what follows it are fp32.
    """
    blocked = a_spec.blocked and b_spec.blocked
    compute = torch.bfloat16 if dtype == torch.bfloat16 and blocked else torch.float32
    inner = [_inner(c, s, s_, compute, unpack) for c, s, s_ in ((a, a_scales, a_spec), (b, b_scales, b_spec))]
    product = inner[0] @ inner[1].t()
    gain = a_spec.gain * b_spec.gain
    product = product * gain if gain != 1.0 else product
    product = product if a_spec.blocked else product * a_scales
    product = product if b_spec.blocked else product * b_scales.t()
    return product.to(dtype)


def _inner(codes: Tensor, scales: Tensor, spec: QuantSpec, dtype: torch.dtype,
           unpack: Callable[[Tensor], Tensor]) -> Tensor:
    """What a GEMM multiplies: codes under their block scales; the codes themselves when a row or the tensor has one."""
    if not spec.blocked:
        return codes.to(dtype)
    return dequantize(codes, scales, spec if spec.gain == 1.0 else _no_gain(spec), dtype, unpack)


def _no_gain(spec: QuantSpec) -> QuantSpec:
    from dataclasses import replace

    return replace(spec, rule="floor")
