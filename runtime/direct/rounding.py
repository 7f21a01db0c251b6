"""What dequantises low-bit weights for a step and rounds them back: Triton kernels on a GPU, else the reference.

Both give the same bits.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from quartet.kernels.reference.optim import lowbit
from quartet.kernels.reference.optim.lowbit import Draw
from quartet.runtime.direct.weight import LowBitWeight


@cache
def _triton() -> ModuleType | None:
    """The kernels, where Triton is installed."""
    try:
        from quartet.kernels.triton.lowbit import ops as kernels
    except ImportError:
        return None
    return kernels


def kernels_for(weight: LowBitWeight) -> ModuleType | None:
    """``quartet.kernels.triton.lowbit.ops`` where it takes the weight, else None: the reference."""
    if weight.device.type != "cuda":
        return None
    kernels: Any = _triton()
    return None if kernels is None or kernels.refusal(weight.device, *weight.shape) else kernels


def numbers(weight: LowBitWeight) -> Tensor:
    """fp32 ``[out, in]``: ``weight.dequantize()``, in one pass where there are kernels."""
    kernels: Any = kernels_for(weight)
    if kernels is None:
        return weight.dequantize()
    return kernels.dequantize(weight.codes, weight.scale, weight.grid, weight.cols, weight.paper)


def absorb(weight: LowBitWeight, new: Tensor, residual: Tensor | None, draw: Draw, *, radial_split: bool,
           rescale: bool) -> Tensor:
    """Round fp32 ``[out, in]`` onto the weight, in place: see ``reference.lowbit.absorb``.

    Returns:
        int64 scalar on the weight's device: how many codes changed.
    """
    kernels: Any = kernels_for(weight)
    torch.autograd.graph.increment_version(weight)  # a backward that still needs the old one says so
    if kernels is not None:
        torch.autograd.graph.increment_version((weight.codes, weight.scale))  # kernels write past autograd
    return (kernels or lowbit).absorb(weight.codes, weight.scale, new, residual, weight.grid, draw, paper=weight.paper,
                                      radial_split=radial_split, rescale=rescale)
