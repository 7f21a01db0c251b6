"""Arguments of the ops that have providers, and the comparison of each provider with the op's reference."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from quartet.kernels import reference
from quartet.kernels.spec import QuantSpec
from quartet.lowering.ir.op import REFERENCE, Op, Provider
from quartet.lowering.ir.ops import core, experts, fp8, fused
from quartet.lowering.targets.blackwell import ops as blackwell
from quartet.lowering.targets.cpu import ops as cpu
from quartet.runtime.devices import Target

NEAREST, MASKED, STOCHASTIC = "e2m1/32 e8m0 quest(rms,nearest) nearest", \
    "e2m1/32 e8m0 quest(rms,nearest) nearest mask", "e2m1/32 e8m0 headroom stochastic"
TENSOR = "e4m3/tensor fp32 amax nearest"
DELAYED = "e4m3/tensor fp32 delayed nearest"
ROTATION, SITE = 32, 5
Example = tuple[Op, tuple[Any, ...]]


def examples(device: torch.device, shapes: Iterable[tuple[int, int]] = ((64, 160), (33, 96))) -> Iterator[Example]:
    """(op, arguments) on a device, of ops whose providers give the same bits, for matrices of these shapes."""
    seed = torch.tensor(-8_765_432_109_876, dtype=torch.int64, device=device)
    yield core.signs, (seed, SITE, 64)
    yield core.random_bits, (seed, SITE, 33, 96)
    for rows, cols in shapes:
        generator = torch.Generator().manual_seed(rows)
        x = torch.randn(rows, cols, generator=generator, dtype=torch.float32, device="cpu").to(device, torch.bfloat16)
        yield from _of_matrix(x, seed)
        if fp8.unavailable(Target.of(device)) is None:
            yield from _of_fp8(x.to(torch.float32))


def _of_matrix(x: Tensor, seed: Tensor) -> Iterator[Example]:
    rows, cols = x.shape
    signs = reference.random_signs(seed, SITE, ROTATION)
    packed = reference.quantize(x.to(torch.float32), QuantSpec.parse(MASKED))
    codes, scales, mask = (tensor.contiguous() for tensor in packed)
    for spec in (NEAREST, MASKED, STOCHASTIC):
        chain = ROTATION, signs, spec, seed if spec == STOCHASTIC else None, SITE
        yield cpu.cpu_quantize, (x, *chain, True, torch.bfloat16)
        yield fused.cuda_quantize, (x, *chain, None, True, True)
    yield blackwell.fp4_quantize, (x, ROTATION, signs, MASKED, None, SITE, None, None, None, False)
    chain = ROTATION, signs, STOCHASTIC, seed, SITE
    yield cpu.cpu_requantize, (codes, scales, NEAREST, *chain, True, torch.bfloat16)
    yield fused.cuda_quantize_both, (x, *chain, None, *chain, None)
    yield fused.cuda_requantize, (codes, scales, NEAREST, *chain, None, True, True)
    yield fused.cuda_fold, (codes, scales, NEAREST)
    yield fused.cuda_fold, (codes, scales, NEAREST, torch.tensor([32, cols], dtype=torch.int32, device=x.device))
    yield fused.dequantize_operand, (codes, scales, NEAREST, torch.bfloat16)
    yield fused.unrotate, (x.to(torch.float32), mask, ROTATION, signs, 0.75, cols - 5, torch.float32)
    for spec in ("e4m3/32 e8m0 ceil nearest", "e4m3/128x128 fp32 amax_pow2 nearest", "int8/row fp32 amax nearest"):
        yield fused.cuda_quantize_bytes, (x, spec)
    yield fused.cuda_quantize_bytes_both, (x, "e4m3/128 fp32 amax_pow2 nearest", "e4m3/32 e8m0 ceil nearest")
    yield fused.cuda_rotated_amax, (x, ROTATION, signs)
    yield fused.cuda_rotate, (x, ROTATION, signs)
    yield blackwell.fp4_quantize_both, (x, *chain, None, *chain, None, False)
    yield blackwell.fp4_requantize, (codes, reference.swizzle_scales(scales), NEAREST, *chain, None, False)


def _of_fp8(x: Tensor) -> Iterator[Example]:
    amax = reference.largest_magnitude(x)
    codes, _ = fp8.fp8_cast.reference(x, 448.0 / amax, "e4m3", True, False)
    index = torch.tensor([3, -1, 0, 3], dtype=torch.int64, device=x.device)
    yield fp8.fp8_cast_rows, (x, 448.0 / amax, "e4m3", True, True, index)
    yield fp8.fp8_cast, (x, 448.0 / amax, "e4m3", True, True)
    yield fp8.fp8_row_major, (codes.t(),)
    several = [x[:len(x) // 4 * 4], -2 * x[:4]]
    yield fp8.amax_of_each, (several,)
    rows = [one.abs().amax(1) for one in several]
    yield fp8.fp8_scales, (rows, TENSOR)
    yield fp8.fp8_casts_by_known, (several, [0.5 * amax, 0.0 * amax], DELAYED, 1, True, True)
    yield fp8.fp8_cast_by_rows, (several[0], rows[0], TENSOR, True, True)
    yield fp8.fp8_casts_by_rows, (several, rows, TENSOR, True, True)
    yield fp8.fp8_casts, (several, fp8.fp8_scales.reference(rows, TENSOR)[0], "e4m3", True, True)
    yield experts.expert_amax, (x.unsqueeze(0),)
    target = Target.of(x.device)
    if target.type == "cuda" and target.lacks("fp8 grouped products") is None:
        yield from _of_experts(x)


def _of_experts(x: Tensor) -> Iterator[Example]:
    """x as two experts' weights, and tokens for each."""
    w = torch.stack((x, -2 * x)).to(torch.bfloat16)
    multiplier, scale = reference.scale_of_amax(reference.largest_magnitude(w), QuantSpec.parse(TENSOR))
    ends = torch.tensor([16, 48], dtype=torch.int32, device=x.device)
    for turned in (False, True):
        codes = experts.codes_of(w, multiplier, TENSOR, not turned)[0]
        a = codes.view(torch.uint8)[:1].repeat(48, 1).view(codes.dtype)
        yield experts.expert_mm, (a, scale.expand(48, 1).reshape(-1), w, multiplier, scale, ends, TENSOR, turned,
                                  torch.bfloat16, True)


def provided(device: torch.device) -> Iterator[tuple[Op, Provider, tuple[Any, ...], str | None]]:
    """Each example with each provider for that type of device, and why it does not run there, or None."""
    target = Target.of(device)
    for op, arguments in examples(device):
        for provider in op.providers:
            if provider.name != REFERENCE and provider.device == device.type:
                yield op, provider, arguments, provider.declines(target)


def results(op: Op, provider: Provider, arguments: tuple[Any, ...]) -> list[tuple[Tensor, Tensor]]:
    """What a provider gives and what it should, tensor by tensor; of one that is replayed, when it is."""
    calls = 2 if provider.replayed else 0
    for _ in range(calls):
        op.overload_of(provider)(*arguments)
    got = op.overload_of(provider)(*arguments) if calls else provider.run(*arguments)
    wanted = op.reference(*arguments)
    return list(zip(got, wanted, strict=True)) if isinstance(got, (tuple, list)) else [(got, wanted)]
