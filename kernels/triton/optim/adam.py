"""Python face of the optimizer kernels: one launch for all tensors of a batch, tables of their pointers on the device.

Bit-equal to ``quartet.kernels.reference.optim.optimizers``, on float32, bfloat16 and float16 weights and gradients.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

from quartet.kernels.reference.optim.optimizers import Hyper, Kind, check
from quartet.kernels.reference.optim.state_format import StateFormat
from quartet.kernels.reference.optim.states import Layout
from quartet.kernels.triton.host import cdiv, hardware, on_device
from quartet.kernels.triton.optim import kernels

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
LOOPS, WARPS = 16, 4
WIDE = 1 << 62  # a bit that keeps an integer argument at 64 bits
_INTEGERS = 16  # that one launch of put16 stores


@dataclass(frozen=True)
class Entry:
    """One tensor of a batch.

    Args:
        param: contiguous, of the batch's dtype. codes, scales: of each state, contiguous.
        step: fp32 scalar on the device. layout: how the tensor falls into tiles.
        site, first_group: of its random bits, see ``reference.optimizers.random_halves``.
    """

    param: Tensor
    codes: tuple[Tensor, ...]
    scales: tuple[Tensor | None, ...]
    step: Tensor
    layout: Layout
    site: int = 0
    first_group: int = 0

    def pointers(self) -> list[int]:
        pad = [0] * (3 - len(self.codes))
        scales = [0 if s is None else s.data_ptr() for s in self.scales]
        return [self.param.data_ptr(), *(c.data_ptr() for c in self.codes), *pad, *scales, *pad, self.step.data_ptr()]


@dataclass(frozen=True)
class States:
    """A constexpr argument of the kernels: element and mode of each of three states, "" of one that is not there."""

    elements: tuple[str, ...]
    modes: tuple[str, ...]


class Batch:
    """Tensors that one launch serves: same device, dtypes and formats of states.

    Args:
        kind: what is computed. entries: the tensors, none of them empty. gradient: dtype of the gradients.
    Raises:
        ValueError: a dtype that the kernels do not take, or tensors that are not those of ``kind`` in their layout.
    """

    def __init__(self, kind: Kind, entries: Sequence[Entry], gradient: torch.dtype) -> None:
        first = entries[0].param
        for what, dtype in (("weights", first.dtype), ("gradients", gradient)):
            if dtype not in TYPES:
                raise ValueError(f"the optimizer kernels take float32, bfloat16 and float16 {what}, not {dtype}")
        for entry in entries:
            check(kind, entry.layout, entry.param, entry.codes, entry.scales)
            if entry.param.dtype is not first.dtype or entry.param.device != first.device:
                raise ValueError(f"one batch holds one dtype on one device, not {first.dtype} on {first.device} and "
                                 f"{entry.param.dtype} on {entry.param.device}")
            if entry.step.numel() != 1 or entry.step.dtype is not torch.float32 or entry.step.device != first.device:
                raise ValueError(f"a step is one number of torch.float32 on {first.device}, not {entry.step.dtype} "
                                 f"{list(entry.step.shape)} on {entry.step.device}")
        self.kind, self.entries, self.device = kind, list(entries), first.device
        self.elements = [entry.param.numel() for entry in entries]
        self.aligned = all(_aligned(e) for e in entries)
        self.gradients_aligned, self.scaled = True, False
        wide = any(t == "fp32" for t in (TYPES[first.dtype], TYPES[gradient], *(f.element for f in kind.formats)))
        many = any(f.expand for f in kind.formats)  # registers, of eight elements a thread
        self.tiles = max(1, (4 if wide or many else 8) * 32 * WARPS // kind.tile)  # of one turn of the loop
        self.types, self.states = (TYPES[first.dtype], TYPES[gradient]), states_of(kind)
        counts = [cdiv(e.layout.total, self.tiles * LOOPS) for e in entries]
        starts = accumulate(counts, initial=0)
        sizes = [[e.layout.total, e.layout.tiles, e.layout.width, e.site, e.first_group, start]
                 for e, start in zip(entries, starts, strict=False)]
        self.sizes = torch.tensor(sizes, dtype=torch.int64, device=self.device)
        each = torch.tensor(counts, dtype=torch.int64, device="cpu")
        chunks = torch.arange(len(entries), dtype=torch.int32, device="cpu").repeat_interleave(each)
        self.chunks = chunks.to(self.device)
        self.work = torch.zeros(len(entries), kernels.WORK.value, dtype=torch.float32, device=self.device)
        self.pointers = self._table([p for e in entries for p in e.pointers()])
        self.gradient_pointers: list[int] = []
        self.gradients = torch.zeros(0, dtype=torch.int64, device="cpu")

    def _table(self, values: list[int]) -> Tensor:
        """Integers on the device. They go as arguments of kernels, which a CUDA graph may capture."""
        table = torch.empty(cdiv(len(values), _INTEGERS) * _INTEGERS, dtype=torch.int64, device=self.device)
        values = values + [0] * (table.numel() - len(values))
        with on_device(table):
            for at in range(0, len(values), _INTEGERS):
                kernels.put16[(1,)](table, at, *(v | WIDE for v in values[at:at + _INTEGERS]), num_warps=1)
        return table

    def set_gradients(self, grads: Sequence[Tensor]) -> None:
        """Take these contiguous gradients, one a tensor, from now on; free where they lie where the last ones did.

        Raises:
            ValueError: a gradient of another number of elements than its parameter.
        """
        sizes = [g.numel() for g in grads]
        if sizes != self.elements:
            raise ValueError(f"gradients of {sizes} elements are not those of parameters of {self.elements}")
        pointers = [g.data_ptr() for g in grads]
        if pointers != self.gradient_pointers:
            self.gradients = self._table(pointers)
            self.gradient_pointers = pointers
            self.gradients_aligned = all(p % 16 == 0 for p in pointers)

    def prepare(self, hyper: Hyper, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Count the step, unless ``found_inf`` (fp32 scalar on the device) is not 0, and find this step's numbers."""
        lr = hyper.lr if isinstance(hyper.lr, Tensor) else None
        self.scaled = hyper.maximize or grad_scale is not None
        with on_device(self.work):
            kernels.prepare[(len(self.entries),)](
                self.pointers, self.work, _bits(0.0 if lr is not None else float(hyper.lr)), _bits(hyper.beta1),
                _bits(hyper.beta2), _bits(hyper.eps), _bits(hyper.weight_decay), lr, grad_scale, found_inf,
                KIND=self.kind, STATES=self.states, MAXIMIZE=hyper.maximize, num_warps=1, enable_fp_fusion=False)

    def measure(self) -> None:
        """Find the largest magnitudes that states with one scale a tensor need and do not know."""
        self._launch(True, 0)

    def settle(self) -> None:
        """Turn largest magnitudes into the scales of this step."""
        with on_device(self.work):
            kernels.settle[(len(self.entries),)](
                self.pointers, self.work, STATES=self.states, num_warps=1, enable_fp_fusion=False)

    def update(self, seed: int) -> None:
        """The pass over memory; ``seed``: of 63 bits, of which the highest is set."""
        self._launch(False, seed)

    def _launch(self, measure: bool, seed: int) -> None:
        with on_device(self.work):
            kernels.update[(self.chunks.numel(),)](
                self.pointers, self.gradients, self.sizes, self.chunks, self.work, seed, KIND=self.kind,
                STATES=self.states, P=self.types[0], G=self.types[1], MEASURE=measure, SCALED=self.scaled,
                ALIGNED=self.aligned and self.gradients_aligned, HARDWARE=hardware(self.device), R=self.tiles,
                B=self.kind.tile, LOOPS=LOOPS, num_warps=WARPS, enable_fp_fusion=False)


def _aligned(entry: Entry) -> bool:
    return entry.layout.width % entry.layout.tile == 0 and all(
        p % 16 == 0 for p in (entry.param.data_ptr(), *(c.data_ptr() for c in entry.codes)))


def mode(form: StateFormat, signed: bool) -> tuple[str, str]:
    """Element and mode of a state, as the kernels name them."""
    element = ("signed" if signed else "unsigned") if form.element == "dynamic" else form.element
    if form.plain:
        return element, "plain"
    if form.per_tensor:
        return element, "tensor" if form.scaling == "delayed" else "current"
    return element, "expanded" if form.expand else "block"


@cache
def states_of(kind: Kind) -> States:
    found = [mode(f, s) for f, s in zip(kind.formats, kind.signed, strict=True)]
    elements, modes = zip(*(found + [("", "")] * 3)[:3], strict=True)
    return States(elements, modes)


def _bits(x: float) -> int:
    """The bits of a float64 as a signed integer, of −0 for 0: never one that fits 32 bits."""
    return struct.unpack("<q", struct.pack("<d", x if x != 0.0 else -0.0))[0]
