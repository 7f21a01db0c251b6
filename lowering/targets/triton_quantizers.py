"""Where the fused Triton quantisers run and what they take, whatever multiplies afterwards."""

from __future__ import annotations

import torch

from quartet.kernels.spec import QuantSpec
from quartet.runtime.devices import Target, without_triton


def supports(target: Target, dtype: torch.dtype, spec: QuantSpec, rotation: int) -> str | None:
    """None when the Triton quantisers take the chain, else why not."""
    reason = without_triton(target)
    if reason is None:
        from quartet.kernels.triton.quantize.chain import supports as takes

        reason = takes(spec, rotation, dtype)
    return reason
