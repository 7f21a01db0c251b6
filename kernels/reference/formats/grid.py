"""Where a value lies on the E2M1 grid: in units of its scale, between which two neighbours."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quartet.kernels.reference.formats.elements import e8m0_decode, e8m0_reciprocal
from quartet.kernels.reference.formats.scales import e8m0_scale, fp32_scale
from quartet.kernels.reference.hadamard import pad_last
from quartet.kernels.spec import QuantSpec


def grid_value(index: Tensor) -> Tensor:
    """Magnitude 0, ½, 1, 1½, 2, 3, 4, 6 of the fp32 index 0…7."""
    return torch.maximum(torch.maximum(index * 0.5, index - 2), 2 * index - 8)


def grid_cell(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(index, g, δ) of fp32 magnitudes up to 6: ``g ≤ a < g + δ`` with neighbours g and g + δ. NaN stays NaN."""
    index = torch.minimum(torch.minimum(a * 2, a + 2), a * 0.5 + 4).floor()
    index = index - (grid_value(index) > a).to(torch.float32)  # a + 2 can round up to the next index
    g = grid_value(index)
    return index, g, grid_value(index + 1) - g


def in_units_of_scale(x: Tensor, spec: QuantSpec,
                      store: Callable[[Tensor], Tensor] = lambda t: t) -> tuple[Tensor, Tensor]:
    """(x / scale, scale) with the scales that ``quantize(x, spec)`` finds, of ``[rows, cols]``.

    Args:
        spec: an e2m1 quantiser with E8M0 scales, or with fp32 scales of blocks or rows.
        store: returns its argument unchanged; applied to the scales, which a compiler should compute once.
    Returns:
        fp32 ``[rows, blocks, block]`` of zero-padded x, and ``[rows, blocks, 1]``; a row is one block.
    """
    x = x.to(torch.float32)
    if not spec.blocked:
        multiplier, scales = map(store, fp32_scale(x, spec))
        return (x * multiplier).unsqueeze(1), scales.unsqueeze(1)
    x = pad_last(x, spec.block)
    blocks = x.reshape(x.shape[0], x.shape[1] // spec.block, spec.block)
    if spec.scale == "fp32":
        multiplier, scales = map(store, fp32_scale(blocks, spec))
        return blocks * multiplier.unsqueeze(-1), scales.unsqueeze(-1)
    scale = store(e8m0_scale(blocks, spec))
    units = blocks * e8m0_reciprocal(scale).unsqueeze(-1)
    return units * (1 / spec.gain) if spec.gain != 1.0 else units, e8m0_decode(scale).unsqueeze(-1)
