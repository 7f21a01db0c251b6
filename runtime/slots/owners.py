"""What belongs to a parameter, kept without a reference to it, strong or weak.

``torch.utils.swap_tensors``, and with it ``Module.double()`` and ``load_state_dict`` in swap mode, refuses tensors that
are weakly referenced. So a parameter is known by its module, which may be: it is the one at its ``id`` as long as its
module has it under its name, whatever memory it has been given since. A parameter of no module is known by the storage
that it lies in. What is kept goes when both have gone.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from weakref import ref

from torch import Tensor, UntypedStorage, nn

Value = TypeVar("Value")


@dataclass(frozen=True)
class Place:
    """A parameter's name in its module."""

    module: ref[nn.Module]
    name: str

    def holds(self, number: int) -> bool:
        """Whether the parameter with this ``id`` is there."""
        module = self.module()
        return module is not None and id(module._parameters.get(self.name)) == number


@dataclass
class _Entry(Generic[Value]):
    value: Value
    place: Place | None
    storage: ref[UntypedStorage]

    def is_of(self, parameter: Tensor) -> bool:
        if self.place is not None and self.place.holds(id(parameter)):
            return True
        return self.storage() is parameter.untyped_storage()

    def is_needed(self, number: int) -> bool:
        return self.place is not None and self.place.holds(number) or self.storage() is not None


class ByParameter(Generic[Value]):
    """Values by parameter."""

    def __init__(self) -> None:
        self._entries: dict[int, _Entry[Value]] = {}
        self._places: dict[int, Place] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, parameter: Tensor) -> Value | None:
        entry = self._entries.get(id(parameter))
        return entry.value if entry is not None and entry.is_of(parameter) else None

    def values(self) -> list[Value]:
        return [entry.value for entry in list(self._entries.values())]

    def present(self) -> dict[int, Value]:
        """``id`` of the parameter that is now where one of ours was → what is kept of ours.

        FSDP2 puts the parameter that it gathers there for a forward, and its shard back.
        """
        found: dict[int, Value] = {}
        for number, entry in list(self._entries.items()):
            module = None if entry.place is None else entry.place.module()
            now = None if entry.place is None or module is None else module._parameters.get(entry.place.name)
            found[number if now is None else id(now)] = entry.value
        return found

    def module_of(self, parameter: Tensor) -> nn.Module | None:
        """The module that has the parameter."""
        entry = self._entries.get(id(parameter))
        return None if entry is None or entry.place is None else entry.place.module()

    def take_over(self, parameter: Tensor, modules: Collection[int]) -> Value | None:
        """What is kept of another tensor that was in the parameter's place before; it is kept of that no more.

        Args:
            modules: ``id`` of those where this can be: FSDP2 puts what it has gathered in the place of its shards.
        """
        if not self._placed(id(parameter)):
            self._places = _all_places()
        place = self._places.get(id(parameter))
        if place is None or id(place.module()) not in modules:
            return None
        number = next((number for number, entry in self._entries.items() if entry.place == place), None)
        return None if number is None else self._entries.pop(number).value

    def put(self, values: Sequence[tuple[Tensor, Value]]) -> None:
        """Replace the values of parameters. New ones make this look once at every object of the process."""
        if any(not self._placed(id(parameter)) for parameter, _ in values):
            self._places = _all_places()
        for parameter, value in values:
            self._put(parameter, value)

    def _put(self, parameter: Tensor, value: Value) -> None:
        number = id(parameter)

        def drop(_: Any) -> None:
            entry = self._entries.get(number)
            if entry is not None and not entry.is_needed(number):
                del self._entries[number]

        place = self._places[number] if self._placed(number) else None
        module = None if place is None else place.module()
        if place is not None and module is not None:
            place = Place(ref(module, drop), place.name)
        self._entries[number] = _Entry(value, place, ref(parameter.untyped_storage(), drop))

    def _placed(self, number: int) -> bool:
        found = self._places.get(number)
        return found is not None and found.holds(number)


def living(kind: type | tuple[type, ...]) -> Iterator[Any]:
    """All objects of a kind, by a look at every object of the process."""
    return (value for value in gc.get_objects() if issubclass(type(value), kind))


def _all_places() -> dict[int, Place]:
    """``id`` of each parameter that a module has → its place."""
    found: dict[int, Place] = {}
    for module in living(nn.Module):
        parameters = vars(module).get("_parameters")
        if isinstance(parameters, dict):
            found.update({id(p): Place(ref(module), name) for name, p in parameters.items() if p is not None})
    return found
