"""What other recipes would have made of X, W and E of a product: the relative error of their quantisers.

As a recipe lays the operands out (``quartet.passes.quantize.layout``): the matrices of a batch below each other; the
tokens of a group with room for as many as its blocks need; the weights of each group with whole tiles. Of a batch, and
of experts, at most ``MATRICES`` are looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quartet.kernels import reference
from quartet.kernels.reference import statistics
from quartet.kernels.reference.products import grouped
from quartet.kernels.spec import QuantSpec
from quartet.runtime.inspect.calls import Call
from quartet.runtime.inspect.gradients import matrices
from quartet.runtime.inspect.operands import Matrix, optional


@dataclass(frozen=True)
class Quantiser:
    """One operand of one product under another recipe.

    Args:
        name: role, operand and recipe.
        spec: the quantiser; None: only what fprop does.
        rotation: before it, 0 for none.
        signs: where those of the rotation are.
        transposed: whether the product contracts the other axis.
        first: quantiser, rotation and signs of what fprop does to the tensor before, of operands that start from that.
        room: what the tokens of a group are padded to a multiple of.
    """

    name: str
    spec: str | None
    rotation: int = 0
    signs: int | None = None
    transposed: bool = False
    first: tuple[str, int, int | None] | None = None
    room: int = 1

    def error(self, x: Tensor, tensors: Sequence[Tensor], ends: Tensor | None) -> Tensor:
        """Σ(q − x)² / Σx² of everything that is done to x, a matrix or a stack of them."""
        if ends is not None:
            ends, source, _ = grouped.group_layout(ends, self.room, x.shape[0])
            x = grouped.gather_rows(x, source)
        q = x
        if self.first is not None:
            spec, rotation, signs = self.first
            x = _rotated(x, rotation, signs, tensors)
            q = _quantised(x, spec)
        if self.transposed:
            q, x = q.mT, x.mT
        if self.spec is not None:
            q, x = (_rotated(one, self.rotation, self.signs, tensors) for one in (q, x))
            q = _quantised(q, self.spec, ends if self.transposed else None)
        return statistics.relative_error(q, x)


@dataclass(frozen=True)
class WhatIf:
    """A tensor and what it could have been quantised by; ``ends``: where groups of its tokens end."""

    names: tuple[str, ...]
    x: Matrix
    quantisers: tuple[Quantiser, ...]
    ends: int | None = None

    def run(self, tensors: Sequence[Tensor], call: Call) -> None:
        x, ends = matrices(self.x.of(tensors)), optional(tensors, self.ends)
        for one in self.quantisers:
            names = tuple(f"{call.rename(name)} {one.name}" for name in self.names)
            call.put("what-if", names, one.error(x, tensors, ends).reshape(1))


def _rotated(x: Tensor, n: int, signs: int | None, tensors: Sequence[Tensor]) -> Tensor:
    if not n:
        return x
    return reference.hadamard(_flat(x), n, optional(tensors, signs)).unflatten(0, x.shape[:-1])


def _quantised(x: Tensor, text: str, ends: Tensor | None = None) -> Tensor:
    """The values of the codes, of the shape of x; stochastic ones by a fixed seed."""
    spec = QuantSpec.parse(text)
    whole = x if x.dim() == 2 or not spec.tile else torch.nn.functional.pad(x, (0, 0, 0, -x.shape[1] % int(spec.block)))
    seed = torch.ones(1, dtype=torch.int64, device=x.device) if spec.stochastic else None
    made = statistics.Quantized.of(_flat(whole), spec, seed, ends=ends)
    return made.values()[:, :x.shape[-1]].unflatten(0, whole.shape[:-1])[..., :x.shape[-2], :]


def _flat(x: Tensor) -> Tensor:
    """Matrices below each other."""
    return x.reshape(-1, x.shape[-1])
