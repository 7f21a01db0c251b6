"""Quantise the rows of a weight that one rank holds, to the bits that a compiled graph gives the whole of it."""

from __future__ import annotations

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
    signs = None if packing.signs is None else ir.FIXED_SIGNS(list(packing.signs), x.device)
    target, amax = Target.of(x.device), None if scale is None else scale.amax
    tail = rotation, signs, packing.spec, None, 0
    if cpu.supports(target, x.dtype, spec, rotation) is None:
        codes, scales, mask, _ = cpu_ops.QUANTIZE(x, *tail, True, None)
    elif target.type == "cuda" and amax is None and triton_quantizers.supports(target, x.dtype, spec, rotation) is None:
        codes, scales, mask, *_ = fused.QUANTIZE(x, *tail, None, True, False)
    else:
        rotated = x if not rotation else ir.HADAMARD(x, rotation, signs, False, torch.float32)
        codes, scales, mask = ir.QUANTIZE(rotated, packing.spec, None, 0, amax)
    planes = {"codes": codes, "scales": scales}
    return planes | {"mask": mask} if spec.mask else planes


def multiple(packing: Packing) -> int:
    """What the row of a weight has to be a multiple of, lest kernels pad it."""
    return chain_multiple(packing.quantizer, packing.rotation)
