"""The parameters that this rank and others train together, by the groups of ranks that do."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

from torch import Tensor, nn
from torch.optim import Optimizer

from quartet.runtime.slots.ranks.agreement import Agreement, Key
from quartet.runtime.slots.ranks.replicas import Groups, groups_of, joins, named
from quartet.runtime.slots.remembered import WEIGHTS, Weight
from quartet.runtime.slots.rows import SLOTS, Home, Slot


@dataclass
class Common:
    """What the ranks of some groups have in common.

    Attributes:
        wrapper: number of the DistributedDataParallel that it is of, whose ranks may run out of inputs.
        members: the weights that this rank has used, each with its place in the list of parameters.
    """

    agreement: Agreement
    wrapper: int | None
    members: list[tuple[int, Weight]]


class Shared:
    """Parameters of some wrappers, then those that optimizers hold and no wrapper.

    The ranks of a program make the same list of them, whatever of it has run on which.
    """

    def __init__(self, wrapped: Sequence[nn.Module], optimizers: Sequence[Optimizer], loose: int) -> None:
        self._wrapped, self._optimizers = [ref(module) for module in wrapped], [ref(one) for one in optimizers]
        self._loose = loose
        self._common: dict[tuple[Groups, int | None], Common] = {}
        self._made_for: tuple[Any, ...] = ()

    @property
    def alive(self) -> bool:
        owners: list[ref[Any]] = [*self._wrapped, *self._optimizers]
        return all(get() is not None for get in owners)

    def is_of(self, wrapped: Sequence[nn.Module], optimizers: Sequence[Optimizer], loose: int) -> bool:
        return ([get() for get in self._wrapped] == list(wrapped) and loose == self._loose
                and [get() for get in self._optimizers] == list(optimizers))

    def advance(self, wrapped: Sequence[nn.Module], loose: Sequence[Tensor], stepped: Collection[int]) -> set[int]:
        """One collective for each set of groups; none while ranks may have run out of inputs.

        ``stepped``: ``id`` of the weights whose pending values count. Returns those of all that have advanced.
        """
        self._look(wrapped, loose)
        done: set[int] = set()
        for common in self._common.values():
            if common.wrapper is None or not joins(wrapped[common.wrapper]):
                def members(common: Common = common) -> list[tuple[int, Weight]]:
                    return common.members

                def adopt(keys: Sequence[Key]) -> None:
                    self._adopt(keys, [parameter for parameter, _ in _numbered(wrapped, loose)])
                    self._look(wrapped, loose)

                common.agreement.advance(members, stepped, adopt)
                done.update(id(weight) for _, weight in common.members)
        return done

    @staticmethod
    def _adopt(keys: Sequence[Key], parameters: Sequence[Tensor]) -> None:
        """Make slots that other ranks have; not of shards, which all ranks gather at once."""
        wanted = [(parameters[place], operand, length) for place, operand, length in keys
                  if not hasattr(parameters[place], "device_mesh")]
        for (parameter, operand, length), weight in zip(wanted, WEIGHTS.of_all([p for p, *_ in wanted]), strict=True):
            SLOTS.put(weight, operand, Slot(Home.empty(1, length, parameter.device), due=False, counted=True))

    def _look(self, wrapped: Sequence[nn.Module], loose: Sequence[Tensor]) -> None:
        made_for = WEIGHTS.known, named()
        if made_for == self._made_for:
            return
        self._made_for = made_for
        present = WEIGHTS.of.present()
        for common in self._common.values():
            common.members.clear()
        for place, (parameter, number) in enumerate(_numbered(wrapped, loose)):
            wrapper = None if number is None else wrapped[number]
            groups = groups_of(parameter, wrapper)
            if groups:
                key = groups, number if isinstance(wrapper, nn.parallel.DistributedDataParallel) else None
                if key not in self._common:
                    self._common[key] = Common(Agreement(groups, parameter.device), key[1], [])
                if (weight := present.get(id(parameter))) is not None:
                    self._common[key].members.append((place, weight))


def _numbered(wrapped: Sequence[nn.Module], loose: Sequence[Tensor]) -> Iterator[tuple[Tensor, int | None]]:
    """Each parameter with the number of its wrapper."""
    for number, module in enumerate(wrapped):
        yield from ((parameter, number) for parameter in module.parameters())
    yield from ((parameter, None) for parameter in loose)
