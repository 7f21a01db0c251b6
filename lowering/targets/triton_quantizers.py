"""Where the fused Triton quantisers run and what they take, whatever multiplies afterwards."""

from __future__ import annotations

import torch

from quartet.kernels.spec import QuantSpec
from quartet.runtime.devices import Target


def unavailable(target: Target) -> str | None:
    """None where the Triton kernels run, else why not."""
    reason = target.lacks("nvidia instructions")
    if reason is not None:
        return reason
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton is not installed ({error}); it comes with PyTorch's CUDA builds"
    return None


def supports(target: Target, dtype: torch.dtype, spec: QuantSpec, rotation: int) -> str | None:
    """None when the Triton quantisers take the chain, else why not."""
    reason = unavailable(target)
    if reason is None:
        from quartet.kernels.triton.quantize.chain import supports as takes

        reason = takes(spec, rotation, dtype)
    return reason
