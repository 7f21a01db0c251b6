"""One collective for all slots that ranks have in common, though each knows only of those that it has used itself.

Ranks need not have run the same layers (LayerDrop) or as many forwards. So they agree on a list of slots, and each
step's collective has a number for each on it, 0 from a rank that has not used it, and one number more: whether a rank
has slots that are not on the list. If so all ranks make the list anew in the next step, where the number has long
arrived and nobody waits for a device; what is not on it yet is kept until then. The first step makes the first list."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from quartet.runtime.slots.ranks.replicas import Groups, largest, union
from quartet.runtime.slots.remembered import Weight
from quartet.runtime.slots.rows import SLOTS, Rows, Slot, alike

Key = tuple[int, str, int]  # place of a weight among the parameters that the ranks hold, operand, length of history


class Agreement:
    """What the ranks of some groups have agreed on."""

    def __init__(self, groups: Groups, device: torch.device) -> None:
        self._groups, self._device = groups, device
        self._keys: list[Key] | None = None
        self._more = _Flag()
        self._parts: list[tuple[Rows, Tensor, list[int]]] = []
        self._made_for: tuple[Any, ...] = ()

    @torch.no_grad()
    def advance(self, members: Callable[[], Sequence[tuple[int, Weight]]], stepped: Collection[int],
                adopt: Callable[[Sequence[Key]], None]) -> None:
        """Push into each history the largest that a rank has pending of it; all ranks call this.

        Args:
            members: the weights that this rank has used, each with its place. stepped: ``id`` of those that this rank's
                optimizers have stepped, of which the pending values count.
            adopt: makes slots that other ranks have, so that their histories are the same here when they are used.
        """
        slots = _slots(members())
        if self._keys is None or self._more.read():
            self._keys = union(list(slots), self._groups)
            if missing := [key for key in self._keys if key not in slots]:
                adopt(missing)
                slots = _slots(members())
        place = {key: 1 + number for number, key in enumerate(self._keys)}
        self._find(slots, place)
        values = torch.zeros(1 + len(place), dtype=torch.float32, device=self._device)
        if any(key not in place for key in slots):
            values[:1] = 1.0
        mine = [_mask([owner in stepped for owner in owners], at.device) for _, at, owners in self._parts]
        for (rows, at, _), mask in zip(self._parts, mine, strict=True):
            pending = rows.pending()
            counts = pending if mask is None else torch.where(mask, pending, 0.0)
            values.index_copy_(0, at.to(values.device), counts.flatten().to(values.device))
        values = largest(values, self._groups)
        for (rows, at, _), mask in zip(self._parts, mine, strict=True):
            rows.push(values.to(at.device).index_select(0, at)[:, None], mask)
        self._more.write(values[:1])

    def _find(self, slots: dict[Key, tuple[int, Slot]], place: dict[Key, int]) -> None:
        """Where the slots that are on the list lie, and where on it."""
        if self._made_for != (SLOTS.moved, len(place), tuple(slots)):
            self._parts = []
            for part in alike([key for key in slots if key in place], lambda key: slots[key][1]):
                rows = Rows([slots[key][1] for key in part])
                at = torch.tensor([place[key] for key in part], dtype=torch.int64,
                                  device=slots[part[0]][1].home.rows.device)
                self._parts.append((rows, at, [slots[key][0] for key in part]))
            self._made_for = SLOTS.moved, len(place), tuple(slots)


class _Flag:
    """A number on a device that the host reads later."""

    def __init__(self) -> None:
        self._value: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def write(self, value: Tensor) -> None:
        if not value.is_cuda:
            self._value = value.clone()
            return
        if self._value is None:
            self._value = torch.empty(1, dtype=torch.float32, device="cpu", pin_memory=True)
        self._value.copy_(value, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()

    def read(self) -> bool:
        """Whether the number that was written last is above 0."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._value is not None and bool(self._value.item() > 0)


def _slots(members: Sequence[tuple[int, Weight]]) -> dict[Key, tuple[int, Slot]]:
    """Key of a slot → ``id`` of its weight, and the slot."""
    return {(place, operand, slot.home.rows.shape[1] - 1): (id(weight), slot) for place, weight in members
            for operand, slot in weight.slots.items()}


def _mask(mine: list[bool], device: torch.device) -> Tensor | None:
    return None if all(mine) else torch.tensor(mine, dtype=torch.bool, device=device)[:, None]
