"""What runs a step: the Triton kernels on a GPU, the compiled kernel on a CPU, the reference anywhere else.

A runner serves parameters of one device, dtype and kind. All three give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from quartet.kernels.cpu import optimizer as cpu
from quartet.kernels.reference.optim import optimizers as ref
from quartet.kernels.reference.optim.optimizers import Hyper, Kind
from quartet.kernels.reference.optim.states import Layout


@dataclass(frozen=True)
class Item:
    """This rank's part of one parameter and its states, as contiguous local tensors; see ``reference.optimizers``."""

    param: Tensor
    codes: tuple[Tensor, ...]
    scales: tuple[Tensor | None, ...]
    step: Tensor
    layout: Layout
    site: int
    first_group: int


@dataclass(frozen=True)
class Scaling:
    """What a ``GradScaler`` hands over: fp32 scalars, or None."""

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


class Runner(Protocol):
    """One step of its items, in place."""

    def run(self, hyper: Hyper, grads: Sequence[Tensor], seed: int, scaling: Scaling) -> None: ...


class Reduction:
    """Makes the largest magnitudes of states with one scale a tensor equal on the ranks that share the tensors."""

    def __init__(self, kind: Kind, scales: Sequence[Sequence[Tensor | None]], groups: Sequence[Any]) -> None:
        self.groups = groups
        self.scales = [s for row in scales for f, s in zip(kind.formats, row, strict=True)
                       if s is not None and f.per_tensor]

    def __call__(self) -> None:
        if not self.groups or not self.scales:
            return
        together = torch.stack([s[1] for s in self.scales])
        for group in self.groups:
            dist.all_reduce(together, dist.ReduceOp.MAX, group=group)
        for i, scale in enumerate(self.scales):
            scale[1].copy_(together[i])


class _Host:
    """Steps that are counted on the host."""

    def __init__(self, kind: Kind, items: Sequence[Item], reduce: Reduction) -> None:
        self.kind, self.items, self.reduce = kind, items, reduce

    def numbers(self, hyper: Hyper, scaling: Scaling) -> list[tuple[float, ...]] | None:
        """Coefficients and step of each item, whose steps are counted; None for a step to leave out."""
        if scaling.found_inf is not None and float(scaling.found_inf) != 0.0:
            return None
        scale = 1.0 if scaling.grad_scale is None else float(scaling.grad_scale)
        known: dict[int, tuple[float, ...]] = {}
        found = []
        for item in self.items:
            step = int(item.step.item()) + 1
            item.step.fill_(step)
            if step not in known:
                known[step] = (*ref.coefficients(self.kind, hyper, step, scale), float(step))
            found.append(known[step])
        return found


class ReferenceRunner(_Host):
    """Plain PyTorch: any device, slow."""

    def run(self, hyper: Hyper, grads: Sequence[Tensor], seed: int, scaling: Scaling) -> None:
        numbers = self.numbers(hyper, scaling)
        if numbers is None:
            return
        rounded = [torch.tensor(row, dtype=torch.float64, device="cpu").to(torch.float32).tolist() for row in numbers]
        if self.kind.per_tensor:
            for item, grad, c in zip(self.items, grads, rounded, strict=True):
                ref.measure(self.kind, item.layout, c, item.param, grad, item.codes, item.scales)
            self.reduce()
        for item, grad, c in zip(self.items, grads, rounded, strict=True):
            ref.update(self.kind, item.layout, c, item.param, grad, item.codes, item.scales,
                       (seed, item.site, int(c[9]), item.first_group))
        self.reduce()


class CpuRunner(_Host):
    """The compiled kernel: all items in one call."""

    def __init__(self, kind: Kind, items: Sequence[Item], reduce: Reduction) -> None:
        super().__init__(kind, items, reduce)
        self.table = [cpu.pointers(kind, i.layout, i.param, i.codes, i.scales, i.site, i.first_group) for i in items]

    def run(self, hyper: Hyper, grads: Sequence[Tensor], seed: int, scaling: Scaling) -> None:
        numbers = self.numbers(hyper, scaling)
        if numbers is None:
            return
        cpu.set_gradients(self.table, grads)
        kinds = (self.items[0].param.dtype, grads[0].dtype) if grads else None
        if self.kind.per_tensor:
            if kinds is not None:
                cpu.run(self.kind, self.table, numbers, *kinds, seed, measure=True)
            self.reduce()
        if kinds is not None:
            cpu.run(self.kind, self.table, numbers, *kinds, seed, measure=False)
        self.reduce()


class GpuRunner:
    """The Triton kernels: two launches, four with one scale a tensor, whatever the number of items; no wait."""

    def __init__(self, kind: Kind, items: Sequence[Item], reduce: Reduction, gradient: torch.dtype) -> None:
        from quartet.kernels.triton.optim import adam

        self.kind, self.reduce = kind, reduce
        entries = [adam.Entry(i.param, i.codes, i.scales, i.step, i.layout, i.site, i.first_group) for i in items]
        self.batch = adam.Batch(kind, entries, gradient) if entries else None

    def run(self, hyper: Hyper, grads: Sequence[Tensor], seed: int, scaling: Scaling) -> None:
        batch = self.batch
        if batch is not None:
            batch.set_gradients(grads)
            batch.prepare(hyper, scaling.grad_scale, scaling.found_inf)
        if self.kind.per_tensor:
            if batch is not None:
                batch.measure()
            self.reduce()
            if batch is not None:
                batch.settle()
        if batch is not None:
            batch.update(seed)
        self.reduce()


def runner(kind: Kind, items: Sequence[Item], reduce: Reduction, device: torch.device, gradient: torch.dtype) -> Runner:
    """The fastest one for a device."""
    if device.type == "cuda" and _has_triton():
        return GpuRunner(kind, items, reduce, gradient)
    if device.type == "cpu" and cpu.unavailable() is None:
        return CpuRunner(kind, items, reduce)
    return ReferenceRunner(kind, items, reduce)


@cache
def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True
