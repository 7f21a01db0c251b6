"""Quantise and dequantise 2-D tensors along the last (contraction) axis, and the product of two quantised ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quartet.kernels.element import decode, encode
from quartet.kernels.reference.formats import nvfp4
from quartet.kernels.reference.formats.elements import e2m1_decode, e2m1_encode, e8m0_decode, e8m0_reciprocal
from quartet.kernels.reference.formats.packing import pack_bits, pack_nibbles, unpack_bits, unpack_nibbles
from quartet.kernels.reference.formats.scales import e8m0_scale, fp32_scale, spread
from quartet.kernels.reference.hadamard import pad_last
from quartet.kernels.reference.philox import random_bits
from quartet.kernels.spec import QuantSpec


def _as_is(x: Tensor) -> Tensor:
    return x


def random_shape(spec: QuantSpec, rows: Any, padded: Any) -> tuple[Any, Any]:
    """Rows and columns of the random bits that a stochastic quantiser of ``[rows, padded]`` takes: one group of bits an
    element, but one a block for ``eden``, in rows of a multiple of 16."""
    return (rows, (padded // spec.block + 15) // 16 * 16) if spec.rule == "eden" else (rows, padded)


def largest_magnitude(x: Tensor) -> Tensor:
    """fp32 ``[1, 1]``, 0 of an empty tensor; NaN where there is one."""
    if isinstance(x.numel(), int) and x.numel() == 0:
        return x.new_zeros(1, 1, dtype=torch.float32)
    return x.abs().amax().to(torch.float32).reshape(1, 1)


def quantize(x: Tensor, spec: QuantSpec, seed: Tensor | None = None, site: int = 0, random: Tensor | None = None,
             store: Callable[[Tensor], Tensor] = _as_is, amax: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise ``[rows, cols]``, sharing scales in blocks along the last axis, in tiles, in rows or in the tensor.

    Args:
        x: any float dtype; computed in fp32. ``cols`` is zero-padded to ``spec.multiple``.
        seed: int64 scalar tensor; needed when ``spec.stochastic``.
        site: which random bits of that seed (0…2^32−1).
        random: those bits, 0…511 in any integer dtype of :func:`random_shape`, where the caller has them already.
        store: returns its argument unchanged; applied to what a compiler should compute once and keep in
            memory: the blocks and what is packed from them ``[rows, blocks, …]``, and the scales and their
            reciprocals ``[rows, blocks]``, or what stands for these with fp32 scales.
        amax: fp32 with one element, needed when ``spec.takes_amax``: the largest magnitude of x, or under the rule
            ``delayed`` what stands for it.
    Returns:
        codes (uint8 ``[rows, padded/2]``, two E2M1 to a byte; else ``[rows, padded]`` of the element's storage),
        scales (uint8 E8M0 or float8_e4m3fn ``[rows, padded/block]``; fp32 ``[rows, 1]`` of rows, ``[1, 1]`` of a
        tensor, ``[rows, padded/block]`` of blocks; ``[⌈rows/block⌉, padded/block]`` of tiles) and, if
        ``spec.mask``, the packed bits of ``|x/scale| < max`` (uint8 ``[rows, padded/8]``), else an empty uint8 tensor.
    """
    if spec.stochastic and seed is None:
        raise ValueError(f"quantiser '{spec}' rounds stochastically and needs a seed")
    if spec.takes_amax and amax is None:
        raise ValueError(f"quantiser '{spec}' needs amax, one largest magnitude for the whole tensor")
    mask = x.new_empty(0, dtype=torch.uint8)
    if spec.scale == "fp32":
        return *_quantize_fp32(x, spec, amax, store), mask
    x = pad_last(x.to(torch.float32), spec.multiple)
    rows, cols = x.shape
    if spec.stochastic and random is None and seed is not None:
        random = random_bits(seed, site, *random_shape(spec, rows, cols))
    if spec.scale == "e4m3":
        assert amax is not None
        return *nvfp4.quantize(x, spec, amax, random, store), mask
    blocks = store(x.reshape(rows, cols // spec.block, spec.block))
    scales = store(e8m0_scale(blocks, spec))
    scaled = blocks * store(e8m0_reciprocal(scales)).unsqueeze(-1)
    if spec.rule == "headroom":
        scaled = scaled * 0.75
    if spec.packed:
        codes = store(pack_nibbles(e2m1_encode(scaled, None if random is None else random.reshape(blocks.shape))))
    else:
        codes = encode(scaled, spec.format)
    if spec.mask:
        mask = store(pack_bits(scaled.abs() < spec.max)).reshape(rows, cols // 8)
    codes = codes.flatten(1)
    return codes, scales, mask


def _quantize_fp32(x: Tensor, spec: QuantSpec, amax: Tensor | None,
                   store: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    if not spec.blocked:
        multiplier, scales = map(store, fp32_scale(x, spec, amax))
        scaled = pad_last(x.to(torch.float32), spec.multiple) * multiplier
    else:
        x = pad_last(x.to(torch.float32), spec.multiple)
        rows, cols = x.shape
        blocks = store(x.reshape(rows, cols // spec.block, spec.block))
        multiplier, scales = map(store, fp32_scale(blocks, spec))
        scaled = (blocks * spread(multiplier, spec, rows).unsqueeze(-1)).reshape(rows, cols)
    if spec.rule == "delayed":
        scaled = torch.where(x.isfinite(), scaled, float("nan"))  # the scale has not seen x
    return encode_fp32(scaled, spec, store), scales


def encode_fp32(scaled: Tensor, spec: QuantSpec, store: Callable[[Tensor], Tensor] = _as_is) -> Tensor:
    """Codes to nearest of ``[rows, padded]`` that is divided by its fp32 scales already."""
    codes = store(pack_nibbles(e2m1_encode(scaled))) if spec.packed else encode(scaled, spec.format)
    return codes.contiguous()


def dequantize(codes: Tensor, scales: Tensor, spec: QuantSpec, dtype: torch.dtype = torch.float32,
               unpack: Callable[[Tensor], Tensor] = unpack_nibbles, amax: Tensor | None = None) -> Tensor:
    """Values ``code · scale · gain`` of a quantised tensor, ``[rows, padded]`` of ``dtype``.

    What has a NaN scale (E8M0 byte 255) is NaN throughout. ``unpack``: another way to do ``unpack_nibbles``.
    ``amax``: what the quantiser had, for two-level scales.
    """
    values = _scaled(codes, scales, spec, unpack)
    if spec.gain != 1.0:
        values = values * spec.gain
    if spec.scale == "e4m3":
        assert amax is not None
        values = values * nvfp4.tensor_scales(amax, spec)[1]
    return values.to(dtype)


def _scaled(codes: Tensor, scales: Tensor, spec: QuantSpec, unpack: Callable[[Tensor], Tensor]) -> Tensor:
    """``code · scale`` in fp32, without gain and without the factor of the tensor."""
    values = e2m1_decode(unpack(codes)) if spec.packed else decode(codes, spec.format)
    if not spec.blocked:
        return values * scales
    rows, cols = values.shape
    decoded = e8m0_decode(scales) if spec.scale == "e8m0" else scales.to(torch.float32)
    blocks = values.reshape(rows, cols // spec.block, spec.block) * spread(decoded, spec, rows).unsqueeze(-1)
    return blocks.reshape(rows, cols)


def apply_mask(x: Tensor, mask: Tensor, unpack: Callable[[Tensor], Tensor] = unpack_bits) -> Tensor:
    """``x`` where the packed bit is set, else 0; ``x [rows, cols]``, ``mask [rows, cols/8]``."""
    return torch.where(unpack(mask), x, torch.zeros((), dtype=x.dtype, device=x.device))


def scaled_mm(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, a_spec: QuantSpec, b_spec: QuantSpec,
              dtype: torch.dtype = torch.float32, unpack: Callable[[Tensor], Tensor] = unpack_nibbles,
              a_amax: Tensor | None = None, b_amax: Tensor | None = None) -> Tensor:
    """``A · Bᵀ`` of two quantised tensors: ``[M, K] × [N, K] → [M, N]`` of ``dtype``.

    The product is of the values without gains and without the scales of rows and tensors, exact in bf16 and
    fp32 (fp16 lacks the range, so it is made from fp32), then multiplied by both gains, by the scales of rows and
    tensors, A's first, and by the factors of two-level scales. Where a scale of an operand can be any fp32 number,
    the product and what follows it are fp32.
    """
    return scaled_bmm(a, a_scales, b, b_scales, a_spec, b_spec, dtype, None, unpack, a_amax, b_amax)


def scaled_bmm(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, a_spec: QuantSpec, b_spec: QuantSpec,
               dtype: torch.dtype, batch: Any, unpack: Callable[[Tensor], Tensor] = unpack_nibbles,
               a_amax: Tensor | None = None, b_amax: Tensor | None = None) -> Tensor:
    """:func:`scaled_mm` of each of ``batch`` matrices: ``[batch·M, K] × [batch·N, K] → [batch·M, N]``.

    The matrices of a batch lie below each other, and were quantised so: a tensor's scale is that of all of them.
    None: one matrix each.
    """
    exact = a_spec.exact_in_bf16 and b_spec.exact_in_bf16
    compute = torch.bfloat16 if dtype == torch.bfloat16 and exact else torch.float32
    left, right = (inner(c, s, s_, compute, unpack) for c, s, s_ in ((a, a_scales, a_spec), (b, b_scales, b_spec)))
    if batch is None:
        product = left @ right.t()
    else:
        product = left.reshape(batch, -1, left.shape[1]) @ right.reshape(batch, -1, right.shape[1]).transpose(1, 2)
    gain = a_spec.gain * b_spec.gain
    product = product * gain if gain != 1.0 else product
    for spec, scales, axis in ((a_spec, a_scales, -2), (b_spec, b_scales, -1)):
        if not spec.blocked:
            product = product * _along(scales, spec, axis, batch)
    product = product if batch is None else product.flatten(0, 1)
    for spec, amax in ((a_spec, a_amax), (b_spec, b_amax)):
        if spec.scale == "e4m3":
            assert amax is not None
            product = product.to(torch.float32) * nvfp4.tensor_scales(amax, spec)[1]
    return product.to(dtype)


def _along(scales: Tensor, spec: QuantSpec, axis: int, batch: Any) -> Tensor:
    """Scales of rows or of a tensor, to multiply the product along one of its axes."""
    if batch is not None and spec.block == "row":
        scales = scales.reshape(batch, -1, 1)
    return scales if axis == -2 else scales.transpose(-2, -1)


def inner(codes: Tensor, scales: Tensor, spec: QuantSpec, dtype: torch.dtype,
          unpack: Callable[[Tensor], Tensor]) -> Tensor:
    """What a GEMM multiplies: codes under their block scales; the codes themselves when a row or the tensor has one."""
    if spec.blocked:
        return _scaled(codes, scales, spec, unpack).to(dtype)
    return e2m1_decode(unpack(codes)).to(dtype) if spec.packed else decode(codes, spec.format, dtype)
