"""fp32 arithmetic with a bound of its rounding errors: what any order of fusing gives lies within it."""

from __future__ import annotations

import torch
from torch import Tensor

UNIT, LEAST = 2.0**-24, 2.0**-149  # of fp32: half the spacing at 1, and the smallest number


class Bounded:
    """The exact result of a formula in float64, and how far from it an evaluation in fp32 may be.

    Each operation adds half an ulp of its result (a root one ulp: vector libraries take that freedom), which a fused
    multiply-add only leaves out; errors of operands are carried along. A number is rounded to fp32 once.
    """

    def __init__(self, value: Tensor | float, error: Tensor | None = None) -> None:
        known = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        self.value = known.double()
        self.error = error if error is not None else torch.zeros_like(self.value)
        if not isinstance(value, Tensor):
            self.error = UNIT * self.value.abs()

    @staticmethod
    def _rounded(value: Tensor, error: Tensor, ulps: float = 0.5) -> Bounded:
        return Bounded(value, error + 2 * ulps * UNIT * (value.abs() + error) + LEAST)

    def __add__(self, other: Bounded) -> Bounded:
        return self._rounded(self.value + other.value, self.error + other.error)

    def __sub__(self, other: Bounded) -> Bounded:
        return self._rounded(self.value - other.value, self.error + other.error)

    def __mul__(self, other: Bounded) -> Bounded:
        carried = self.value.abs() * other.error + other.value.abs() * self.error + self.error * other.error
        return self._rounded(self.value * other.value, carried)

    def __truediv__(self, other: Bounded) -> Bounded:
        quotient, room = self.value / other.value, (other.value.abs() - other.error).clamp(min=0.0)
        return self._rounded(quotient, (self.error + quotient.abs() * other.error) / room)

    def sqrt(self) -> Bounded:
        root = self.value.sqrt()
        return self._rounded(root, torch.where(root > 0, self.error / root, self.error.sqrt()), ulps=1.0)

    def excess(self, x: Tensor) -> float:
        """The largest distance of fp32 ``x`` from the exact value, of what is allowed; below 1 is within."""
        off = (x.double() - self.value).abs()
        return torch.where(off > 0, off / self.error, 0.0).max().item()
