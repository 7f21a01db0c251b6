"""Gradients of a step against the products of the unquantised operands, in a part that is cheap to keep and compute.

    one matrix    X [tokens, in]           W [out, in]            E [tokens, out]
    a batch       X [batch, tokens, in]    W [batch, out, in]     E [batch, tokens, out]
    groups        X [tokens, in]           W [groups, out, in]    E [tokens, out], and where each group ends

    gX = E·W      gW = Eᵀ·X                of each matrix of a batch, of each group

The part is :data:`COLUMNS` evenly spaced columns of X and of W, in :data:`MATRICES` evenly spaced matrices of a batch
or groups. Nothing waits for the device: groups are told apart by masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quartet.kernels.reference import statistics
from quartet.runtime.inspect.calls import Call
from quartet.runtime.inspect.operands import Matrix

COLUMNS, MATRICES = 64, 8


@dataclass(frozen=True)
class Keep:
    """The part of X and W that is kept from forward, which alone has them, to backward."""

    layer: str
    x: Matrix
    w: Matrix

    def run(self, tensors: Sequence[Tensor], call: Call) -> None:
        call.kept[self.layer] = tuple(sample(m.of(tensors)).float() for m in (self.x, self.w))


@dataclass(frozen=True)
class Product:
    """Cosine and relative error of ``out``, the gradient of X or of W; ``ends``: where the groups of the tokens end."""

    name: str
    layer: str
    of_weight: bool
    e: Matrix
    out: Matrix
    ends: int | None = None

    def run(self, tensors: Sequence[Tensor], call: Call) -> None:
        if self.layer not in call.kept:
            return
        x, w = call.kept[self.layer]
        e, got = self.e.of(tensors), sample(self.out.of(tensors)).float()
        if self.ends is not None:
            got, exact = _of_groups(e.float(), x, w, got, self.of_weight, tensors[self.ends])
        else:
            e = matrices(e).float()
            exact = e.mT @ x if self.of_weight else e @ w
        call.put("product", (call.rename(self.name),),
                 torch.stack((statistics.cosine(got, exact), statistics.relative_error(got, exact))))


def _of_groups(e: Tensor, x: Tensor, w: Tensor, got: Tensor, of_weight: bool, ends: Tensor) -> tuple[Tensor, Tensor]:
    """What was computed and the exact gradient, with zeros for tokens of other groups than those of ``w``."""
    group = torch.searchsorted(ends, torch.arange(e.shape[0], dtype=ends.dtype, device=ends.device), right=True)
    within = (group == _spaced(ends.shape[0], MATRICES, ends.device).unsqueeze(1)).unsqueeze(2)  # [groups, tokens, 1]
    if of_weight:
        return got, torch.stack([_where(own, e).mT @ _where(own, x) for own in within])
    exact = torch.zeros_like(got)
    for own, matrix in zip(within, w, strict=True):
        exact += _where(own, e) @ matrix
    return _where(within.any(0), got), exact


def _where(own: Tensor, x: Tensor) -> Tensor:
    """``x`` with zeros in the other rows, whatever they hold."""
    return torch.where(own, x, torch.zeros((), dtype=x.dtype, device=x.device))


def sample(x: Tensor) -> Tensor:
    """The columns that are compared, of :func:`matrices`; a copy."""
    return matrices(x).index_select(-1, _spaced(x.shape[-1], COLUMNS, x.device))


def matrices(x: Tensor) -> Tensor:
    """The matrices of a stack that are compared; a matrix as it is."""
    return x if x.dim() == 2 or x.shape[0] <= MATRICES else x.index_select(0, _spaced(x.shape[0], MATRICES, x.device))


def _spaced(count: int, most: int, device: torch.device) -> Tensor:
    """At most so many of ``count`` positions, evenly spaced."""
    taken = min(count, most)
    return torch.arange(taken, device=device) * count // max(taken, 1)
