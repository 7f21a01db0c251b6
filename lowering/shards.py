"""Quantise the rows of a weight that one rank holds, to the bits that a compiled graph gives the whole of it."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from quartet.kernels.reference.quantize import encode_fp32
from quartet.kernels.spec import chain_multiple
from quartet.lowering import ir
from quartet.lowering.ir.ops import fp8, fused
from quartet.lowering.targets import triton_quantizers
from quartet.lowering.targets.cpu import lower as cpu
from quartet.lowering.targets.cpu import ops as cpu_ops
from quartet.runtime.devices import Target
from quartet.runtime.distributed import Packing, Scale


def quantize_shard(x: Tensor, packing: Packing, scale: Scale | None) -> dict[str, Tensor]:
    """Codes, scales and, where the spec has one, the clip mask of ``[rows, in]``, by name.

    ``scale``: of the whole tensor, where the spec needs its largest magnitude.
    """
    spec, rotation = packing.quantizer, packing.rotation
    if spec.block == "tensor":
        assert scale is not None
        if spec.element in ir.FLOAT8:
            return {"codes": fp8.CAST(x, scale.multiplier, spec.element, True, False)[0]}
        return {"codes": encode_fp32(x.to(torch.float32) * scale.multiplier, spec)}
    signs, amax = _signs(packing.signs, x.device), None if scale is None else scale.amax
    tail, takes = (rotation, signs, packing.spec, None, 0), _fused(packing, x.device, x.dtype)
    if takes == "cpu":
        codes, scales, mask, _ = cpu_ops.QUANTIZE(x, *tail, True, None)
    elif takes == "cuda" and amax is None:
        codes, scales, mask, *_ = fused.QUANTIZE(x, *tail, None, True, False)
    else:
        rotated = x if not rotation else ir.HADAMARD(x, rotation, signs, False, torch.float32)
        codes, scales, mask = ir.QUANTIZE(rotated, packing.spec, None, 0, amax)
    planes = {"codes": codes, "scales": scales}
    return planes | {"mask": mask} if spec.mask else planes


@cache
def _signs(signs: tuple[int, ...] | None, device: torch.device) -> Tensor | None:
    return None if signs is None else ir.FIXED_SIGNS(list(signs), device)


@cache
def _fused(packing: Packing, device: torch.device, dtype: torch.dtype) -> str | None:
    """The type of device whose fused quantisers take a shard, None where the reference has to."""
    target, spec, rotation = Target.of(device), packing.quantizer, packing.rotation
    if cpu.supports(target, dtype, spec, rotation) is None:
        return "cpu"
    taken = target.type == "cuda" and triton_quantizers.supports(target, dtype, spec, rotation) is None
    return "cuda" if taken else None


def multiple(packing: Packing) -> int:
    """What the row of a weight has to be a multiple of, lest kernels pad it."""
    return chain_multiple(packing.quantizer, packing.rotation)
