"""What NVFP4 takes from the whole tensor, by its amax: its quantiser's multiplier, and the factor of its values."""

from __future__ import annotations

import torch
from torch.fx import Node

from quartet.kernels.reference.formats.nvfp4 import tensor_scales
from quartet.kernels.spec import QuantSpec
from quartet.lowering.ir.graph import Builder, inline, val
from quartet.runtime import compat


def encode(build: Builder, amax: Node, spec: QuantSpec) -> Node:
    """fp32 ``[1, 1]``: what multiplies the tensor before it is divided by the scales of its blocks."""
    return _scale(build, amax, spec, 0)


def decode(build: Builder, amax: Node, spec: QuantSpec) -> Node:
    """fp32 ``[1, 1]``: what multiplies ``code · scale``."""
    return _scale(build, amax, spec, 1)


def _scale(build: Builder, amax: Node, spec: QuantSpec, index: int) -> Node:
    def traced(x: torch.Tensor) -> tuple[torch.Tensor]:
        return (tensor_scales(x, spec)[index],)

    return inline(build, compat.trace(traced, [val(amax)]), [amax])[0]
