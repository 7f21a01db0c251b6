"""Which graph runs, for which layers, and whether this step is recorded.

A graph that is inspected has an input more, the ``token`` (int64 ``[1]`` on the CPU), whose value is a number that
stands for the graph and the weights of the call. Its ops find the :class:`Call` by it. So one compiled graph serves
every interval and every layer of its kind, and what a cache holds of it is text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor, nn

from quartet.runtime.inspect.clock import CLOCK
from quartet.runtime.inspect.recorder import Recorder, Row

_MOST = 4096  # layers of one graph; it begins anew then


class Call:
    """One graph with the weights of one call.

    Args:
        recorder: gets what is recorded.
        rename: what the graph calls a layer → what it is called here.
    """

    def __init__(self, recorder: Recorder, rename: Callable[[str], str]) -> None:
        number = next(_NUMBERS)
        with torch.inference_mode(False):
            self.token = torch.tensor([number], dtype=torch.int64, device="cpu")
        self.recorder, self.rename = recorder, rename
        self.step, self.kept = -1, dict[str, tuple[Tensor, ...]]()
        self._at: tuple[bool, int] | None = None
        self._recorded: set[str] | None = None  # what of this step is recorded; None: nothing is to be
        self._forwards = 0
        _CALLS[number] = self

    def begin(self) -> None:
        """A forward begins."""
        at = self.recorder.now(self._forwards)
        self._forwards += 1
        self.recorder.begin(at)
        if at == self._at:
            return
        self._at, self.step = at, at[1]
        self.kept.clear()
        self._recorded = set() if self.step % self.recorder.every == 0 else None
        if self._recorded is not None:
            self.recorder.copy_to_host()  # what an earlier step has recorded

    def takes(self, text: str) -> bool:
        """Whether what ``text`` names is to be recorded now: once in a step that is, of micro-batches the first."""
        if self._recorded is None or text in self._recorded:
            return False
        self._recorded.add(text)
        return True

    def put(self, kind: str, names: tuple[str, ...], values: Tensor) -> None:
        self.recorder.put(Row(self.step, kind, names, values))


_NUMBERS = count(1)
_CALLS: WeakValueDictionary[int, Call] = WeakValueDictionary()


def call_of(token: Tensor) -> Call | None:
    """Whose token it is; None of :func:`no_token`."""
    return _CALLS.get(int(token.item()))


def no_token() -> Tensor:
    """A token that stands for nothing, to trace with."""
    return torch.tensor([0], dtype=torch.int64, device="cpu")


@dataclass(frozen=True)
class Layers:
    """What the layers of a graph are called, also where it serves several.

    Args:
        place: of what was compiled in the model, such as ``"layers.0"``; empty where it is the model.
        model: holds all that the graph serves; None where that is one.
        serves: name in the model of the part whose code the graph is.
        weight: index of an input that is a parameter of that part, and its name in the model.
    """

    place: str = ""
    model: Callable[[], nn.Module | None] = lambda: None
    serves: str = ""
    weight: tuple[int, str] | None = None

    @staticmethod
    def of(place: str, model: nn.Module | None, serves: str, weights: Mapping[int, str]) -> Layers:
        """``weights``: the full names of a graph's parameters by input; ``model``: None where the graph serves one."""
        known = next(((i, name) for i, name in weights.items() if serves and name.startswith(f"{serves}.")), None)
        return Layers(place) if model is None or known is None else Layers(place, ref(model), serves, known)

    def rename(self, args: Sequence[Any]) -> Callable[[str], str]:
        """What the graph calls a layer → its name in the model, where these are the inputs."""
        prefix, model = f"{self.place}." if self.place else "", self.model()
        if self.weight is None or model is None:
            return prefix.__add__
        index, compiled = self.weight
        parameter = args[index]
        name = next((name for name, one in nn.Module.named_parameters(model) if one is parameter), compiled)
        own, serves = name.removesuffix(compiled[len(self.serves):]), self.serves

        def renamed(text: str) -> str:
            full = prefix + text
            return own + full[len(serves):] if full.startswith(f"{serves}.") else full

        return renamed


@dataclass
class Inspected:
    """A compiled graph whose last input is a token, found anew for the weights of each call."""

    compiled: Callable[..., Any]
    recorder: Recorder
    layers: Layers
    _calls: dict[int, Call] = field(default_factory=dict)

    def __post_init__(self) -> None:
        CLOCK.watch()

    def __call__(self, *args: Any) -> Any:
        call = self._of(args)
        call.begin()
        return self.compiled(*args, call.token)

    def _of(self, args: Sequence[Any]) -> Call:
        key = 0 if self.layers.weight is None else id(args[self.layers.weight[0]])
        found = self._calls.get(key)
        if found is None:
            if len(self._calls) >= _MOST:
                self._calls.clear()
            found = self._calls[key] = Call(self.recorder, self.layers.rename(args))
        return found
