"""Slots of delayed scaling, and where their numbers lie: rows of shared tensors, read and written all at once.

A row is fp32 ``[1 + length]``: the largest magnitude since the history last advanced (pending), then the history,
newest first, 0 where there is none yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar
from weakref import ref

import torch
from torch import Tensor

from quartet.runtime.slots.remembered import WEIGHTS, Counted, Weight

Item = TypeVar("Item")


@dataclass(eq=False)
class Home:
    """``rows``: fp32 ``[slots, 1 + length]``, and the slots that have been put there."""

    rows: Tensor
    slots: list[ref[Slot]] = field(default_factory=list)

    @staticmethod
    def empty(rows: int, length: int, device: torch.device) -> Home:
        """Empty histories, also when called under ``torch.inference_mode``."""
        with torch.inference_mode(False):
            return Home(torch.zeros(rows, 1 + length, dtype=torch.float32, device=device))

    def living(self) -> list[Slot]:
        return [slot for get in self.slots if (slot := get()) is not None and slot.home is self]


@dataclass(eq=False)
class Slot(Counted):
    """One operand's state: row ``index`` of ``home``."""

    home: Home
    index: int = 0

    def __post_init__(self) -> None:
        self.home.slots.append(ref(self))

    @property
    def row(self) -> Tensor:
        return self.home.rows[self.index]

    def fits(self, length: int, device: torch.device) -> bool:
        return self.home.rows.device == device and self.home.rows.shape[1] == 1 + length

    def move(self, home: Home, index: int) -> None:
        self.home, self.index = home, index
        home.slots.append(ref(self))
        SLOTS.moved += 1


class Slots:
    """All slots of this process, by weight and operand."""

    def __init__(self) -> None:
        self.moved = 0  # counts changes of place
        self.frozen = 0

    def of(self, parameter: Tensor) -> dict[str, Slot]:
        """operand → slot of a parameter."""
        weight = WEIGHTS.of.get(parameter)
        return {} if weight is None else weight.slots

    def put(self, weight: Weight, operand: str, slot: Slot) -> None:
        weight.slots[operand] = slot
        self.moved += 1


SLOTS = Slots()


class Rows:
    """The rows of slots of one length and device; void once ``SLOTS.moved`` has changed."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        home, index = _one_home(slots), [slot.index for slot in slots]
        self._all = home.rows
        with torch.inference_mode(False):
            self._at = None if index == list(range(len(self._all))) else torch.tensor(
                index, dtype=torch.int64, device=self._all.device)

    def read(self) -> Tensor:
        return self._all if self._at is None else self._all.index_select(0, self._at)

    def pending(self) -> Tensor:
        """``[slots, 1]``; what is not finite as infinity, which a maximum keeps."""
        seen = self.read()[:, :1]
        return torch.where(seen.isfinite(), seen, float("inf"))

    def push(self, seen: Tensor, mine: Tensor | None = None) -> None:
        """``seen`` ``[slots, 1]`` is the newest of each history; zero and infinity leave a history as it is.

        ``mine``: bool ``[slots, 1]``, of which slots the pending values are among them; None for all.
        """
        rows = self.read()
        pending, history = rows[:, :1], rows[:, 1:]
        rest = torch.zeros_like(pending) if mine is None else torch.where(mine, 0.0, pending)
        usable = torch.logical_and(seen > 0, seen < float("inf"))
        pushed = torch.where(usable, torch.cat((seen, history[:, :-1]), 1), history)
        self._write(torch.cat((rest, pushed), 1))

    def record(self, amax: Tensor) -> None:
        """The pending values are at least ``amax``, fp32 ``[slots]``."""
        pending = self._all[:, 0]
        if self._at is None:
            pending.copy_(torch.maximum(pending, amax))
        else:
            pending.index_copy_(0, self._at, torch.maximum(pending.index_select(0, self._at), amax))

    def _write(self, rows: Tensor) -> None:
        if self._at is None:
            self._all.copy_(rows)
        else:
            self._all.index_copy_(0, self._at, rows)


def _one_home(slots: Sequence[Slot]) -> Home:
    """Where all these slots are; what shares a home with one of them moves with it, so that no two move in turns."""
    homes = list({id(slot.home): slot.home for slot in slots}.values())
    if len(homes) > 1:
        together = [slot for home in homes for slot in home.living()]
        with torch.inference_mode(False):
            made = Home(torch.stack([slot.row for slot in together]))
        for index, slot in enumerate(together):
            slot.move(made, index)
    return slots[0].home


def alike(items: Iterable[Item], slot_of: Callable[[Item], Slot]) -> list[list[Item]]:
    """Items by the device and length of their slots."""
    found: dict[tuple[torch.device, int], list[Item]] = {}
    for item in items:
        rows = slot_of(item).home.rows
        found.setdefault((rows.device, rows.shape[1]), []).append(item)
    return list(found.values())


@torch.no_grad()
def push_alone(slots: Iterable[Slot]) -> None:
    """Push the pending values of slots into their histories."""
    for part in alike(slots, lambda slot: slot):
        rows = Rows(part)
        rows.push(rows.pending())
