"""The differentiable gradient estimator of FP4 (DGE, arXiv 2501.17116): a slope for a quantiser, which has none."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from quartet.kernels.reference.formats.grid import grid_cell, in_units_of_scale
from quartet.kernels.spec import QuantSpec

ESTIMATORS = ("straight-through", "dge")
SHARPNESS = 5  # k
LARGEST = 3.0  # where the slope is clipped


def dge_slope(x: Tensor, spec: QuantSpec, store: Callable[[Tensor], Tensor] = lambda t: t) -> Tensor:
    """The factor on the gradient of ``x``, fp32 ``[rows, cols]`` like x.

    In a cell [g, g + δ] of the grid the quantiser is taken for ``g + δ/2·(1 + sign(u)·|u|^(1/k))`` with
    ``u = 2(x − g)/δ − 1``, a step rounded off; what it is differentiated to, with k = 5, is

        min((1/k)·|u|^(1/k − 1), 3)

    1/5 on the grid, 3 half way between two of its values. x counts in units of its scale, which is taken as constant.
    Values beyond ±6 count as ±6; NaN gives NaN. The power is fp32: compiled code may differ in the last bits.

    Args:
        spec: what quantises x. store: see :func:`quartet.kernels.reference.formats.grid.in_units_of_scale` for both.
    """
    units, _ = in_units_of_scale(x, spec, store)
    a = units.abs().clamp(max=spec.max)
    _, g, delta = grid_cell(a)
    u = ((a - g) * (2.0 / delta) - 1.0).abs()
    slope = (u ** (1.0 / SHARPNESS - 1.0) * (1.0 / SHARPNESS)).clamp(max=LARGEST)
    return slope.flatten(1)[:, : x.shape[1]]
