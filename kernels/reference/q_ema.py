"""Rounding by a moving average (Q-EMA, TetraJet, arXiv 2502.20853): weights that oscillate between two codes rest."""

from __future__ import annotations

import torch
from torch import Tensor

from quartet.kernels.reference.formats.grid import grid_cell, grid_value, in_units_of_scale
from quartet.kernels.spec import QuantSpec


def toward(x: Tensor, reference: Tensor, spec: QuantSpec) -> Tensor:
    """``x [rows, cols]`` moved to whichever of its two neighbours on the grid is nearer to ``reference``.

    Both count in units of the scale that ``quantize(x, spec)`` finds. A value on the grid stays; a tie goes to the
    even code; where the reference is NaN, x itself decides. With ``reference = x`` the result is x rounded to nearest.
    Quantised with the same spec it keeps its values: its scale is that of x or, where the largest of a block moved
    down to half of the grid, half of that.

    Args:
        reference: of the same shape, any float dtype.
        spec: an e2m1 quantiser to nearest with E8M0 scales by ``floor`` or ``ceil``.
    Returns:
        dtype of x, but fp32 of float16, whose range is shorter than E8M0's.
    """
    units, scale = in_units_of_scale(x, spec)
    given = torch.nn.functional.pad(reference.to(torch.float32), (0, units.shape[1] * units.shape[2] - x.shape[1]))
    given = given.reshape(units.shape) / scale
    a = units.abs().clamp(max=spec.max)
    index, g, delta = grid_cell(a)
    given = torch.where(given.isnan(), a, torch.where(units < 0, -given, given))
    middle = g + 0.5 * delta
    up = torch.logical_or(given > middle, torch.logical_and(given == middle, index % 2 == 1))
    moved = grid_value(index + torch.logical_and(up, a > g).to(torch.float32))
    moved = torch.copysign(moved, units) * scale
    out = moved.flatten(1)[:, : x.shape[1]]
    return out.to(torch.float32 if x.dtype is torch.float16 else x.dtype)
