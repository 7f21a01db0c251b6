"""What a run of an op in Python allocates and launches, as a plan that C++ repeats.

A plan holds for every call of the same signature if the run did nothing but make tensors, show them otherwise, fill
them with zeros, and launch functions. Where it did anything else, ``reason`` says what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quartet.kernels.launcher import Argument, Function, packed
from quartet.runtime.compat import TorchDispatchMode

_aten = torch.ops.aten
_EMPTY = {_aten.empty.memory_format, _aten.new_empty.default, _aten.empty_strided.default,
          _aten.new_empty_strided.default, _aten.empty_like.default}
_ZEROS = {_aten.zeros.default, _aten.new_zeros.default, _aten.zeros_like.default}

INPUT, BUFFER, HELD, SCALAR = range(4)  # enum Source of replay.cpp


class NotReplayable(Exception):
    """What a run did that no plan repeats."""


def tensors_of(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among an op's arguments, and in lists among them, in their order."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, list):
            yield from tensors_of(argument)


@dataclass(frozen=True)
class _Step:
    name: str
    head: tuple[int, ...]  # function, grid, threads, shared memory, bytes to fill
    values: tuple[tuple[int, int, int], ...]


class Recorder(TorchDispatchMode):
    """Records while it is entered; ``launched`` and ``refuse`` are for ``quartet.kernels.launcher``."""

    def __init__(self, arguments: Iterable[Any]) -> None:
        super().__init__()
        self.reason: str | None = None
        self._origins: dict[int, tuple[int, int]] = {}  # by id of a tensor: what it shows
        self._kept: list[Tensor] = []  # so that ids stay theirs
        self._tensors: dict[int, list[Tensor]] = {
            INPUT: list(tensors_of(arguments)), BUFFER: [], HELD: []}
        self._steps: list[_Step] = []
        for i, x in enumerate(self._tensors[INPUT]):
            if id(x) not in self._origins:
                self._note(x, INPUT, i)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _EMPTY or func in _ZEROS:
            self._tensors[BUFFER].append(result)
            self._note(result, BUFFER, len(self._tensors[BUFFER]) - 1)
            if func in _ZEROS:
                self._fill(result)
        elif func is _aten.zero_.default:
            self._fill(result)
        elif _is_view(func):
            self._show(func, args[0], result)
        else:
            self.refuse(f"it runs {func}")
        return result

    def refuse(self, reason: str) -> None:
        """Nothing is to be repeated."""
        self.reason = self.reason or reason

    def launched(self, function: Function, grid: tuple[int, int, int], arguments: Sequence[Argument]) -> None:
        head = (function.handle, *grid, function.threads, function.shared, 0)
        _LOADED[function.handle] = function
        self._append(lambda: _Step(function.name, head, tuple(
            self._value(*each) for each in zip(function.parameters, arguments, strict=True))))

    def plan(self, results: Any, number: Callable[[torch.dtype], int]) -> tuple[list[int], list[str], list[Tensor]]:
        """The arguments of ``quartet_replay::commit``, whose ``Reader`` reads the first; ``number`` is C++'s of a type.

        Raises:
            NotReplayable: there is no plan of what was recorded.
        """
        if self.reason is not None:
            raise NotReplayable(self.reason)
        given = list(results) if isinstance(results, (tuple, list)) else [results]
        words = [len(self._tensors[BUFFER])]
        for x in self._tensors[BUFFER]:
            words += [number(x.dtype), *_listed(x.shape), *_listed(x.stride())]
        words.append(len(self._steps))
        for step in self._steps:
            words += [*step.head, len(step.values), *(word for value in step.values for word in value)]
        words += [len(given), *(word for result in self._results(given, number) for word in result)]
        return words, [step.name for step in self._steps], self._tensors[HELD]

    def _results(self, results: list[Any], number: Callable[[torch.dtype], int]) -> Iterable[list[int]]:
        returned = set()
        for x in results:
            source, at = self._origins.get(id(x), (HELD, -1))
            if source != BUFFER or at in returned:
                raise NotReplayable("it returns a tensor that it has not made, or two that share memory")
            returned.add(at)
            whole = x is self._tensors[BUFFER][at]
            yield [at, int(whole), number(x.dtype), x.storage_offset(), *_listed(x.shape), *_listed(x.stride())]

    def _note(self, x: Tensor, source: int, at: int) -> None:
        self._kept.append(x)
        self._origins[id(x)] = source, at

    def _show(self, func: Any, x: Tensor, results: Any) -> None:
        """``contiguous`` and ``reshape``, which autograd takes apart and not every mode above it does, may have
        copied."""
        try:
            source, at = self._origin(x)
        except NotReplayable as error:
            self.refuse(str(error))
            return
        for result in results if isinstance(results, (tuple, list)) else [results]:
            if result.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
                self.refuse(f"it runs {func}, which copies")
            elif id(result) not in self._origins:
                self._note(result, source, at)

    def _fill(self, x: Tensor) -> None:
        if not x.is_contiguous():
            self.refuse("it fills a tensor with gaps")
        elif x.numel():
            head = (0, 0, 0, 0, 0, 0, x.numel() * x.element_size())
            self._append(lambda: _Step("zeros", head, (self._place(x),)))

    def _append(self, step: Callable[[], _Step]) -> None:
        try:
            self._steps.append(step())
        except NotReplayable as error:
            self.refuse(str(error))

    def _value(self, kind: str, argument: Argument) -> tuple[int, int, int]:
        if isinstance(argument, Tensor):
            return self._place(argument)
        return SCALAR, int.from_bytes(bytes(packed(kind, argument)).ljust(8, b"\0"), "little", signed=True), 0

    def _place(self, x: Tensor) -> tuple[int, int, int]:
        source, at = self._origin(x)
        offset = x.data_ptr() - self._tensors[source][at].data_ptr() if x.numel() else 0
        return source, at, offset

    def _origin(self, x: Tensor) -> tuple[int, int]:
        """What a tensor shows. One that was there before, and is no argument, is held from now on."""
        found = self._origins.get(id(x))
        if found is None:
            memory = x.untyped_storage().data_ptr()
            if any(known.untyped_storage().data_ptr() == memory for known in self._kept if known.numel()):
                raise NotReplayable("it passes on a tensor whose origin is not seen")
            self._tensors[HELD].append(x)
            self._note(x, HELD, len(self._tensors[HELD]) - 1)
            found = self._origins[id(x)]
        return found


_LOADED: dict[int, Function] = {}
"""The functions that plans launch, by handle: they stay loaded."""


def _is_view(func: Any) -> bool:
    returned = [result.alias_info for result in func._schema.returns]
    return bool(returned) and all(alias is not None and not alias.is_write for alias in returned)


def _listed(sizes: Sequence[int]) -> list[int]:
    return [len(sizes), *sizes]
