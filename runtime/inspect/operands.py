"""Tensors of a program by their positions, and the statistics of what one quantiser reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quartet.kernels import reference
from quartet.kernels.reference import statistics
from quartet.kernels.spec import QuantSpec
from quartet.runtime.inspect.calls import Call


@dataclass(frozen=True)
class Matrix:
    """A matrix, or a stack of them, in normal orientation: its position, and whether it lies transposed."""

    at: int
    flipped: bool = False

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[self.at].mT if self.flipped else tensors[self.at]


@dataclass(frozen=True)
class Stored:
    """A tensor that is made from codes: dequantised to ``dtype``, ``cols`` columns of it, transposed."""

    scales: int
    spec: str
    dtype: str
    amax: int | None = None
    cols: int | None = None
    turned: bool = False

    def of(self, codes: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        values = reference.dequantize(codes, tensors[self.scales], QuantSpec.parse(self.spec),
                                      getattr(torch, self.dtype), amax=optional(tensors, self.amax))
        values = values if self.cols is None else values[:, :self.cols]
        return values.t() if self.turned else values


@dataclass(frozen=True)
class Operand:
    """What a quantiser reads, with its own rotation, random numbers, largest magnitude, and ends of groups."""

    names: tuple[str, ...]
    x: int
    spec: str
    rotation: int = 0
    signs: int | None = None
    seed: int | None = None
    site: int = 0
    amax: int | None = None
    ends: int | None = None
    stored: Stored | None = None

    def run(self, tensors: Sequence[Tensor], call: Call) -> None:
        x = tensors[self.x] if self.stored is None else self.stored.of(tensors[self.x], tensors)
        if self.rotation:
            x = reference.hadamard(x, self.rotation, optional(tensors, self.signs))
        seed, amax, ends = (optional(tensors, at) for at in (self.seed, self.amax, self.ends))
        call.put("operand", tuple(map(call.rename, self.names)),
                 statistics.operand_statistics(x, QuantSpec.parse(self.spec), seed, self.site, amax, ends))


def optional(tensors: Sequence[Tensor], at: int | None) -> Tensor | None:
    """The tensor at a position that may be none."""
    return None if at is None else tensors[at]
