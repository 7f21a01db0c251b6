"""Delayed scaling: the largest magnitudes that an operand had in the last steps, and what reads and writes them.

A *slot* is one operand (``x``, ``w``, ``e``) of the products of one weight. It holds fp32 ``[1 + length]``: the largest
magnitude seen since the history last advanced (pending), then the history, newest first, 0 where there is none yet.

    begin(anchor, table, device)             fp32 [slots]: largest entry of each history, 0 when empty. Before that the
                                             slots that are due advance by their pending value, maximised over the ranks
    read(anchor, table, device)              the same without advancing, for graphs that have no backward
    record(anchor, table, slots, amax)       pending = max(pending, amax): doing it twice changes nothing

A graph does not own its slots: several graphs read the same ones, and one graph serves several modules. So it has an
input more, the ``anchor``, whose value is a number that stands for the weights of the call (int64 [1] on the CPU), and
the table says in text which slots the graph means, by weight. All that a cached graph needs at run time is in the
arguments of its ops. Nothing is ever written to the anchor; that the ops are declared to do so keeps them in order.

When a slot is due, ``quartet.runtime.slots.remembered`` says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor

from quartet.runtime.slots.remembered import WEIGHTS, Counted, Weight


@dataclass(eq=False)
class Slot(Counted):
    """One operand's state: row ``index`` of ``home`` (fp32 ``[rows, 1 + length]``)."""

    home: Tensor
    index: int = 0

    @property
    def row(self) -> Tensor:
        return self.home[self.index]


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


@contextmanager
def frozen() -> Iterator[None]:
    """Nothing that runs meanwhile changes a slot, or makes one."""
    SLOTS.frozen += 1
    try:
        yield
    finally:
        SLOTS.frozen -= 1


def new_rows(rows: int, length: int, device: torch.device) -> Tensor:
    """Empty histories, also when called under ``torch.inference_mode``."""
    with torch.inference_mode(False):
        return torch.zeros(rows, 1 + length, dtype=torch.float32, device=device)


class Group:
    """Slots of one length: where a table has them, and their rows as one tensor.

    ``home`` is that tensor where the slots are its rows in order; otherwise rows are gathered and scattered.
    """

    def __init__(self, positions: list[int], slots: list[Slot]) -> None:
        self.positions, self.slots = positions, slots
        first = slots[0].home
        whole = first.shape[0] == len(slots) and all(s.home is first and s.index == i for i, s in enumerate(slots))
        self.home = first if whole else None
        self._at: dict[tuple[int, ...], Tensor] = {}

    def read(self) -> Tensor:
        return self.home if self.home is not None else torch.stack([slot.row for slot in self.slots])

    def write(self, rows: Tensor) -> None:
        if self.home is not None:
            self.home.copy_(rows)
        else:
            for slot, row in zip(self.slots, rows.unbind(), strict=True):
                slot.row.copy_(row)

    def advance(self) -> None:
        """Push the pending values of the slots that are due; zero and what is not finite keep the history as it is."""
        due = [slot.due for slot in self.slots]
        if not any(due):
            return
        rows = self.read()
        pending, history = rows[:, :1], rows[:, 1:]
        pushed = torch.where(torch.isfinite(pending), pending, float("inf"))
        rest = torch.zeros_like(pending)
        if not all(due):
            now = torch.tensor(due, device=rows.device)[:, None]
            pushed, rest = torch.where(now, pushed, 0.0), torch.where(now, rest, pending)
        pushed = _largest_of_all_ranks(pushed)
        usable = torch.logical_and(pushed > 0, pushed < float("inf"))
        self.write(torch.cat((rest, torch.where(usable, torch.cat((pushed, history[:, :-1]), 1), history)), 1))
        for slot in self.slots:
            slot.due = not slot.counted

    def largest(self) -> Tensor:
        return self.read()[:, 1:].amax(1)

    def record(self, which: list[int], amax: Tensor) -> None:
        """``which``: numbers of slots of the group, each once."""
        if self.home is not None:
            at = self._at.get(tuple(which))
            if at is None:
                at = self._at[tuple(which)] = torch.tensor(which, device=self.home.device)
            pending = self.home[:, 0]
            pending.index_copy_(0, at, torch.maximum(pending.index_select(0, at), amax))
        else:
            for number, value in zip(which, amax.unbind(), strict=True):
                pending = self.slots[number].row[:1]
                pending.copy_(torch.maximum(pending, value))


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
        return flat[torch.tensor(order, device=flat.device).argsort()]

    def record(self, slots: Sequence[int], amax: Tensor) -> None:
        for group in self.groups:
            mine = [i for i, slot in enumerate(slots) if self.place[slot][0] is group]
            if mine:
                values = amax if len(mine) == len(slots) else amax[torch.tensor(mine, device=amax.device)]
                group.record([self.place[slots[i]][1] for i in mine], values)


def _slots(entries: list[Entry], weights: Mapping[int, Weight], device: torch.device) -> list[Slot]:
    """Slots of one length. Unless all exist as they should, they are put together in one new tensor."""
    length = entries[0].length
    found: list[Slot | None] = [weights[e.weight].slots.get(e.operand) for e in entries]
    fit = all(s is not None and s.home.device == device and s.home.shape[1] == 1 + length for s in found)
    loaded = len(found) > 1 and any(s is not None and len(s.home) == 1 for s in found)
    if fit and not loaded:
        return [slot for slot in found if slot is not None]
    home, slots = new_rows(len(entries), length, device), []
    for index, (entry, slot) in enumerate(zip(entries, found, strict=True)):
        if slot is None:
            slot = Slot(home, index)
        else:
            kept = slot.row[: 1 + length].to(device)
            home[index, : len(kept)] = kept
            slot.home, slot.index = home, index
        SLOTS.put(weights[entry.weight], entry.operand, slot)
        slots.append(slot)
    return slots


class Anchor:
    """What a graph's extra input stands for: the weights of a call, by input of the graph."""

    def __init__(self, weights: Mapping[int, Tensor]) -> None:
        number = next(_NUMBERS)
        with torch.inference_mode(False):
            self.tensor = torch.tensor([number])
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


_NUMBERS = count(1)
_ANCHORS: WeakValueDictionary[int, Anchor] = WeakValueDictionary()


def weight_of(anchor: Tensor, index: int) -> Weight | None:
    """Of the parameter at an input of the graph that an anchor was given to; None for no anchor, and while frozen."""
    owner = _ANCHORS.get(int(anchor.item()))
    return None if owner is None or SLOTS.frozen else owner.weights[index]()


def no_anchor() -> Tensor:
    """An anchor that stands for nothing, to trace with."""
    return torch.tensor([0])


class Anchored:
    """A compiled graph whose last input is an anchor, found anew for each call's weights."""

    def __init__(self, compiled: Callable[..., Any], weights: Sequence[int]) -> None:
        self.compiled, self.indices = compiled, tuple(weights)
        self._anchors: dict[int, Anchor] = {}
        WEIGHTS.watch()

    def __call__(self, *args: Any) -> Any:
        WEIGHTS.after_compiled_steps()
        return self.compiled(*args, self._find(args).tensor)

    def _find(self, args: Sequence[Any]) -> Anchor:
        weights = {index: args[index] for index in self.indices}
        key = id(weights[self.indices[0]])
        found = self._anchors.get(key)
        if found is None or not found.stands_for(weights):
            self._anchors = {k: anchor for k, anchor in self._anchors.items() if anchor.alive}
            found = self._anchors[key] = Anchor(weights)
        return found


_group: Any = None


def reduce_over(group: Any) -> None:
    """Maximise pending magnitudes over this process group instead of all ranks; ``False``: over none.

    All ranks of the group have to run the same graphs: under pipeline parallelism give the data-parallel group.
    """
    global _group
    _group = group


def _largest_of_all_ranks(seen: Tensor) -> Tensor:
    dist = torch.distributed
    if _group is False or not (dist.is_available() and dist.is_initialized()):
        return seen
    if dist.get_world_size(_group) > 1:
        seen = seen.contiguous()
        dist.all_reduce(seen, dist.ReduceOp.MAX, _group)
    return seen


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
        return torch.zeros(len(Entry.parse_all(text)), device=device)
    if advance:
        table.advance()
    return table.largest()


@torch.no_grad()
def record(anchor: Tensor, table: str, slots: list[int], amax: list[Tensor]) -> None:
    found = _table(anchor, table, amax[0].device)
    if found is not None:
        found.record(slots, torch.cat(amax).flatten())
