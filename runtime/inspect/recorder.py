"""What the ops of inspected graphs record: rows of statistics, and whether products were finite.

No op waits for a device: what is recorded is copied to the host when the next step is recorded, beside the computation.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim import Optimizer

from quartet.runtime.inspect.clock import CLOCK
from quartet.runtime.optimizer_steps import OPTIMIZER_STEPS

RESULT = "its result"
_MOST_FLAGS = 1 << 17  # that are noted before they are looked at, though no optimizer steps


class NotFinite(ArithmeticError):
    """A product had an operand or a result that is NaN or infinite; the message names the first."""


@dataclass(eq=False)
class Row:
    """What was recorded of one thing in one step.

    Args:
        step: of training.
        kind: ``"operand"``, ``"product"``, ``"what-if"``, ``"alignment"`` or ``"loss"``.
        names: what it is of; several where layers share it.
        values: float64 with one axis, on the device of what was measured until the recorder has it copied.
    """

    step: int
    kind: str
    names: tuple[str, ...]
    values: Tensor


@dataclass(frozen=True)
class Flags:
    """Whether the tensors of one product, each with a name, were finite: bool with one axis, on their device."""

    step: int
    role: str
    layer: str
    names: tuple[str, ...]
    finite: Tensor


class Recorder:
    """What the graphs of one inspector record.

    Args:
        every: steps from one that is recorded to the next; may be changed while a model trains.
        keep: how many rows are kept, the latest.
    """

    def __init__(self, every: int = 100, keep: int = 200_000) -> None:
        self.every = every
        self._rows: deque[Row] = deque(maxlen=keep)
        self._fresh: list[Row] = []  # those that may be on a GPU
        self._copies: list[torch.cuda.Event] = []
        self.step = 0
        self._flags: list[Flags] = []
        self._unused: list[Flags] = []  # of gradients that nobody has used yet
        self._thrown_away: list[Flags] = []  # of those that no optimizer of this step has used
        self._clock: int | None = None  # when a forward began the last time
        self._steps = 0  # times that it has moved from one forward to the next
        self._at = False, 0  # what :meth:`now` told then

    def now(self, forwards: int) -> tuple[bool, int]:
        """Whether an optimizer makes the steps, and which it is since this recorder began, of a forward that begins.

        Steps of several optimizers between two forwards of its own are one. ``forwards``: how many its graph has begun
        before, which are the steps until an optimizer has made one; then they turn out to have been micro-batches of
        the first.
        """
        before, self._clock = self._clock, CLOCK.now()
        if before not in (None, self._clock):
            self._steps += 1
            if self._steps == 1:
                self._rows = deque((row for row in self._rows if row.step == 0), self._rows.maxlen)
        return self._steps > 0, self._steps or forwards

    def put(self, row: Row) -> None:
        self._rows.append(row)
        self._fresh.append(row)

    def copy_to_host(self) -> None:
        """Have what was recorded on GPUs copied into pinned memory, without waiting for it."""
        groups: dict[tuple[torch.device, int], list[Row]] = {}
        for row in self._fresh:
            if row.values.is_cuda:
                groups.setdefault((row.values.device, row.values.numel()), []).append(row)
        self._fresh.clear()
        self._copies = [copy for copy in self._copies if not copy.query()]
        for (device, _), rows in groups.items():
            stacked = torch.stack([row.values for row in rows])
            held = torch.empty(stacked.shape, dtype=stacked.dtype, device="cpu", pin_memory=True)
            held.copy_(stacked, non_blocking=True)
            with torch.cuda.device(device):
                self._copies.append(torch.cuda.Event())
                self._copies[-1].record()
            for row, values in zip(rows, held.unbind(), strict=True):
                row.values = values

    def rows(self) -> list[Row]:
        """All that is kept, on the host; waits for the devices."""
        self.copy_to_host()
        for copy in self._copies:
            copy.synchronize()
        self._copies.clear()
        return list(self._rows)

    def clear(self) -> None:
        """Forget all that was recorded, and count steps from 0."""
        self._rows.clear()
        self._fresh.clear()
        for noted in (self._flags, self._unused, self._thrown_away):
            noted.clear()
        self._clock, self._steps = None, 0

    def flag(self, flags: Flags) -> None:
        """Note what is looked at before the next step of an optimizer."""
        _CHECKED.add(self)
        OPTIMIZER_STEPS.before_each(raise_if_not_finite)
        self._flags.append(flags)

    def begin(self, at: tuple[bool, int]) -> None:
        """A forward begins, in a step that :meth:`now` has told.

        Raises:
            NotFinite: as :meth:`raise_if_not_finite` where an optimizer has stepped without a look, a compiled one.
                Where none has, gradients that were not finite are none before a forward has something like that too.
        """
        if at == self._at and len(self._flags) < _MOST_FLAGS:
            return
        self._at, self.step, self._thrown_away = at, at[1], []
        if at[0]:
            self.raise_if_not_finite()
            return
        earlier, self._unused = self._unused, self._bad()
        if any(bad.role == "fprop" for bad in self._unused):
            raise NotFinite(_message([*earlier, *self._unused][0]))

    def raise_if_not_finite(self, optimizer: Optimizer | None = None) -> None:
        """Look at all that was noted since the last time; waits for the devices.

        Args:
            optimizer: one that is about to step. Gradients that were not finite are no error where all that it steps
                by are: they were thrown away, as a GradScaler does while it looks for its scale.

        Raises:
            NotFinite: names the first product in the order of execution.
        """
        bad, self._unused = [*self._unused, *self._bad()], []
        forward = next((one for one in bad if one.role == "fprop"), None)
        if forward is not None or bad and optimizer is None:
            raise NotFinite(_message(forward or bad[0]))
        self._thrown_away += bad
        if self._thrown_away and optimizer is not None and not _steps_by_finite(optimizer):
            raise NotFinite(_message(self._thrown_away[0]))

    def _bad(self) -> list[Flags]:
        """What was noted of products that were not finite since the last look, with the names of those tensors."""
        flags, self._flags = self._flags, []
        seen = {device: torch.cat([f.finite for f in flags if f.finite.device == device]).tolist()
                for device in {f.finite.device for f in flags}}
        found = []
        for one in flags:
            held = seen[one.finite.device]
            fine, seen[one.finite.device] = held[:len(one.names)], held[len(one.names):]
            if not all(fine):
                names = tuple(name for name, well in zip(one.names, fine, strict=True) if not well)
                found.append(replace(one, names=names))
        return found


_CHECKED: WeakSet[Recorder] = WeakSet()


def raise_if_not_finite(optimizer: Optimizer | None = None) -> None:
    """:meth:`Recorder.raise_if_not_finite` of all recorders."""
    for recorder in list(_CHECKED):
        recorder.raise_if_not_finite(optimizer)


def _steps_by_finite(optimizer: Optimizer) -> bool:
    """Whether all gradients are finite, or a GradScaler has told the optimizer to skip the step."""
    found_inf = getattr(optimizer, "found_inf", None)
    if found_inf is not None and bool(found_inf):
        return True
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return all(bool(torch.isfinite(gradient).all()) for gradient in gradients)


def _message(bad: Flags) -> str:
    product, operands = f"{bad.role} of {bad.layer}", [name for name in bad.names if name != RESULT]
    if operands:
        return (f"step {bad.step}: {product} is the first product with an operand that is not finite: "
                f"{', '.join(operands)}")
    return (f"step {bad.step}: {product} is the first product whose result is not finite. Its operands are: "
            "it overflows, or its quantisers do")
