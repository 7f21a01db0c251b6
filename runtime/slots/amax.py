"""Delayed scaling: the largest magnitudes that an operand had in the last steps, and what reads and writes them.

A *slot* is one operand (``x``, ``w``, ``e``) of the products of one weight. It holds fp32 ``[1 + length]``: the largest
magnitude seen since the history last advanced (pending), then the history, newest first, 0 where there is none yet.

    begin(anchor, table, device)             fp32 [slots]: largest entry of each history, 0 when empty. Before that the
                                             slots that no optimizer counts advance by their pending value
    read(anchor, table, device)              the same without advancing, for graphs that have no backward
    record(anchor, table, slots, amax)       pending = max(pending, amax), of all tensors of amax one after the other:
                                             doing it twice changes nothing

A graph does not own its slots: several graphs read the same ones, and one graph serves several modules. So it has an
input more, the ``anchor``, whose value is a number that stands for the weights of the call (int64 [1] on the CPU), and
the table says in text which slots the graph means, by weight. All that a cached graph needs at run time is in the
arguments of its ops. Nothing is ever written to the anchor; that the ops are declared to do so keeps them in order.

Whose slots an optimizer counts, and when those advance, ``quartet.runtime.slots.steps`` says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor

from quartet.runtime.compat import backward_number
from quartet.runtime.slots.remembered import WEIGHTS, Weight
from quartet.runtime.slots.rows import SLOTS, Home, Rows, Slot


@dataclass(frozen=True)
class Entry:
    """A slot as a table names it: the weight's input of the graph, the operand, the length of the history."""

    weight: int
    operand: str
    length: int

    def __str__(self) -> str:
        return f"{self.weight}.{self.operand}/{self.length}"

    @staticmethod
    def parse_all(table: str) -> list[Entry]:
        return [Entry(int(i), operand, int(length)) for i, operand, length in re.findall(r"(\d+)\.(\S+)/(\d+)", table)]


@contextmanager
def frozen() -> Iterator[None]:
    """Nothing that runs meanwhile changes a slot, or makes one."""
    SLOTS.frozen += 1
    try:
        yield
    finally:
        SLOTS.frozen -= 1


class Group:
    """Slots of one length: where a table has them, and their rows."""

    def __init__(self, positions: list[int], slots: list[Slot]) -> None:
        self.positions, self.slots, self._rows = positions, slots, Rows(slots)
        self._at: dict[tuple[int, ...], Rows] = {}

    def advance(self) -> None:
        """Push the pending values of the slots that are due."""
        due = [slot for slot in self.slots if slot.due]
        if due:
            rows = self._rows if len(due) == len(self.slots) else Rows(due)
            rows.push(rows.pending())
            for slot in due:
                slot.due = not slot.counted

    def largest(self) -> Tensor:
        return self._rows.read()[:, 1:].amax(1)

    def record(self, which: list[int], amax: Tensor) -> None:
        """``which``: numbers of slots of the group, each once."""
        found = self._at.get(tuple(which))
        if found is None:
            found = self._at[tuple(which)] = Rows([self.slots[number] for number in which])
        found.record(amax)


class Table:
    """The slots that one graph means, for one set of weights."""

    def __init__(self, entries: list[Entry], weights: Mapping[int, Weight], device: torch.device) -> None:
        self.entries = entries
        lengths: dict[int, list[int]] = {}
        for position, entry in enumerate(entries):
            lengths.setdefault(entry.length, []).append(position)
        self.groups = [Group(positions, _slots([entries[p] for p in positions], weights, device))
                       for positions in lengths.values()]
        self.place = {p: (g, n) for g in self.groups for n, p in enumerate(g.positions)}

    def advance(self) -> None:
        for group in self.groups:
            group.advance()

    def largest(self) -> Tensor:
        if len(self.groups) == 1:
            return self.groups[0].largest()
        order = [p for group in self.groups for p in group.positions]
        flat = torch.cat([group.largest() for group in self.groups])
        return flat[torch.tensor(order, dtype=torch.int64, device=flat.device).argsort()]

    def record(self, slots: Sequence[int], amax: Tensor) -> None:
        for group in self.groups:
            mine = [i for i, slot in enumerate(slots) if self.place[slot][0] is group]
            if mine:
                if len(mine) < len(slots):
                    values = amax[torch.tensor(mine, dtype=torch.int64, device=amax.device)]
                else:
                    values = amax
                group.record([self.place[slots[i]][1] for i in mine], values)


def _slots(entries: list[Entry], weights: Mapping[int, Weight], device: torch.device) -> list[Slot]:
    """Slots of one length, made, or made to fit, where they are not as they should be."""
    length = entries[0].length
    found: list[Slot | None] = [weights[e.weight].slots.get(e.operand) for e in entries]
    unfit = [i for i, slot in enumerate(found) if slot is None or not slot.fits(length, device)]
    if unfit:
        home = Home.empty(len(unfit), length, device)
        for index, number in enumerate(unfit):
            entry, slot = entries[number], found[number]
            if slot is None:
                counted = weights[entry.weight].counted
                slot = found[number] = Slot(home, index, due=not counted, counted=counted)
                SLOTS.put(weights[entry.weight], entry.operand, slot)
            else:
                kept = slot.row[: 1 + length].to(device)
                home.rows[index, : len(kept)] = kept
                slot.move(home, index)
                SLOTS.moved += 1
    return [slot for slot in found if slot is not None]


class Anchor:
    """What a graph's extra input stands for: the weights of a call, by input of the graph."""

    def __init__(self, weights: Mapping[int, Tensor]) -> None:
        number = next(_NUMBERS)
        with torch.inference_mode(False):
            self.tensor = torch.tensor([number], dtype=torch.int64, device="cpu")
        known = WEIGHTS.of_all(weights.values())
        self.weights = {index: ref(weight) for index, weight in zip(weights, known, strict=True)}
        self._tables: dict[tuple[str, torch.device], Table] = {}
        self._moved = SLOTS.moved
        _ANCHORS[number] = self

    @property
    def alive(self) -> bool:
        return all(weight() is not None for weight in self.weights.values())

    def stands_for(self, weights: Mapping[int, Tensor]) -> bool:
        return all((known := WEIGHTS.of.get(weight)) is not None and known is self.weights[index]()
                   for index, weight in weights.items())

    def table(self, text: str, device: torch.device) -> Table:
        found = self._tables.get((text, device)) if self._moved == SLOTS.moved else None
        if found is None:
            weights = {index: weight for index, get in self.weights.items() if (weight := get()) is not None}
            found = Table(Entry.parse_all(text), weights, device)
            if self._moved != SLOTS.moved:
                self._tables.clear()
            self._moved, self._tables[text, device] = SLOTS.moved, found
        return found


def calls() -> list[list[Weight]]:
    """The weights of each call."""
    return [[weight for get in anchor.weights.values() if (weight := get()) is not None]
            for anchor in list(_ANCHORS.values())]


_NUMBERS = count(1)
_ANCHORS: WeakValueDictionary[int, Anchor] = WeakValueDictionary()


def weight_of(anchor: Tensor, index: int) -> Weight | None:
    """Of the parameter at an input of the graph that an anchor was given to; None for no anchor, and while frozen."""
    owner = _ANCHORS.get(int(anchor.item()))
    return None if owner is None or SLOTS.frozen else owner.weights[index]()


def no_anchor() -> Tensor:
    """An anchor that stands for nothing, to trace with."""
    return torch.tensor([0], dtype=torch.int64, device="cpu")


def read(anchor: Tensor, table: str, device: torch.device) -> Tensor:
    return _largest(anchor, table, device, False)


def begin(anchor: Tensor, table: str, device: torch.device) -> Tensor:
    return _largest(anchor, table, device, True)


def _table(anchor: Tensor, text: str, device: torch.device) -> Table | None:
    owner = _ANCHORS.get(int(anchor.item()))
    return None if owner is None or SLOTS.frozen else owner.table(text, device)


@torch.no_grad()
def _largest(anchor: Tensor, text: str, device: torch.device, advance: bool) -> Tensor:
    table = _table(anchor, text, device)
    if table is None:
        return torch.zeros(len(Entry.parse_all(text)), dtype=torch.float32, device=device)
    if advance and backward_number() is None:  # a forward that runs there is computed again
        table.advance()
    return table.largest()


@torch.no_grad()
def record(anchor: Tensor, table: str, slots: list[int], amax: list[Tensor]) -> None:
    found = _table(anchor, table, amax[0].device)
    if found is not None:
        found.record(slots, torch.cat([value.flatten() for value in amax]))
