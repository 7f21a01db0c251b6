"""What the ops of inspected graphs record: rows of statistics, and whether products were finite.

No op waits for a device: what is recorded is copied to the host when the next step is recorded, beside the computation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakSet

import torch
from torch import Tensor

from quartet.runtime.inspect.clock import CLOCK

RESULT = "its result"


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
    product: str
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
        self._begun: int | None = None  # by the clock

    def now(self, forwards: int) -> int:
        """The step since this recorder began, of a forward that begins. ``forwards``: how many its graph has begun
        before, which are the steps where no optimizer has made one."""
        clock = CLOCK.now()
        if self._begun is None:
            self._begun = clock
        return clock - self._begun or forwards

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
        for (device, _), rows in groups.items():
            stacked = torch.stack([row.values for row in rows])
            held = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=True)
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
        self._flags.clear()
        self._begun = None

    def flag(self, flags: Flags) -> None:
        """Note what is looked at before the next step of an optimizer."""
        _CHECKED.add(self)
        self._flags.append(flags)

    def raise_if_not_finite(self) -> None:
        """Look at all that was noted since the last time; waits for the devices.

        Raises:
            NotFinite: names the first product in the order of execution.
        """
        flags, self._flags = self._flags, []
        seen = {device: torch.cat([f.finite for f in flags if f.finite.device == device]).tolist()
                for device in {f.finite.device for f in flags}}
        for one in flags:
            held = seen[one.finite.device]
            fine, seen[one.finite.device] = held[:len(one.names)], held[len(one.names):]
            if not all(fine):
                bad = [name for name, well in zip(one.names, fine, strict=True) if not well]
                raise NotFinite(_message(one, bad))


_CHECKED: WeakSet[Recorder] = WeakSet()


def raise_if_not_finite() -> None:
    """:meth:`Recorder.raise_if_not_finite` of all recorders."""
    for recorder in list(_CHECKED):
        recorder.raise_if_not_finite()


CLOCK.before_each_step(raise_if_not_finite)


def _message(first: Flags, bad: Sequence[str]) -> str:
    operands = [name for name in bad if name != RESULT]
    if operands:
        return (f"step {first.step}: {first.product} is the first product with an operand that is not finite: "
                f"{', '.join(operands)}")
    return (f"step {first.step}: {first.product} is the first product whose result is not finite. Its operands are: "
            "it overflows, or its quantisers do")
