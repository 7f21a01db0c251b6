"""What belongs to a tensor's memory, kept without a reference to any tensor.

``torch.utils.swap_tensors``, and with it ``Module.double()`` and ``load_state_dict`` in swap mode, refuses tensors that
are weakly referenced. Storages may be: PyTorch keeps one Python object for each as long as its memory lives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar
from weakref import ref

import torch
from torch import Tensor, UntypedStorage

Value = TypeVar("Value")


class ByStorage(Generic[Value]):
    """Values by the storage that a tensor lies in; ``dropped(number)`` is called when that storage has gone."""

    def __init__(self, dropped: Callable[[int], None] = lambda number: None) -> None:
        self._values: dict[int, tuple[ref[UntypedStorage], Value]] = {}
        self._dropped = dropped

    def __len__(self) -> int:
        return len(self._values)

    def get(self, tensor: Tensor) -> Value | None:
        """The value of the tensor's storage."""
        found = self._values.get(storage_number(tensor))
        return None if found is None else found[1]

    def put(self, tensor: Tensor, value: Value) -> None:
        """Replace the value of the tensor's storage."""
        storage = tensor.untyped_storage()
        number = id(storage)

        def drop(_: ref[UntypedStorage]) -> None:
            self._values.pop(number, None)
            self._dropped(number)

        self._values[number] = ref(storage, drop), value


def storage_number(tensor: Tensor) -> int:
    """What tells a storage from all others that live; a tensor of a layout without one raises NotImplementedError."""
    return id(tensor.untyped_storage())


def has_storage(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided
