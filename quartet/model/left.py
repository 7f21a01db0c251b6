"""Models of ``quartet.compile`` of which dynamo makes no graph, so that no backend is asked for anything.

It leaves a whole function to Python where a graph would have to end at a place that it cannot go on from, as inside of
a loop or a ``try``. If that is the model's forward, and no layer's own is compiled, the model trains as it is. Whoever
steps its parameters first is told so.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from weakref import ref

from torch import nn
from torch.optim import Optimizer

from quartet.model.names import Names, unwrapped
from quartet.passes.plan.plan import UnsupportedMatmul
from quartet.runtime.breaks import Break, left_since, now
from quartet.runtime.optimizer_steps import OPTIMIZER_STEPS


@dataclass(frozen=True)
class _Expected:
    """A model that graphs are expected of. ``since``: when it was compiled."""

    model: ref[nn.Module]
    strict: bool
    since: int


_expected: dict[int, _Expected] = {}


def expect(model: nn.Module, strict: bool) -> None:
    """Look at the first step of the model's parameters whether there was a graph of it."""
    _expected[id(model)] = _Expected(ref(model), strict, now())
    OPTIMIZER_STEPS.after_each(_after_step)


def met(names: Names) -> None:
    """There is a graph of the model that gives these names, or of a part of it."""
    for number, one in list(_expected.items()):
        model = one.model()
        parts: Iterable[nn.Module] = () if model is None else nn.Module.modules(model)
        if model is None or any(part is names.compiled or part is names.model for part in parts):
            del _expected[number]


def _after_step(optimizer: Optimizer) -> None:
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]} if _expected else set()
    for number, one in list(_expected.items()):
        model = one.model()
        if model is None:
            del _expected[number]
        elif not stepped.isdisjoint(map(id, model.parameters())):
            del _expected[number]
            left = _left(unwrapped(model), one.since)
            if left is not None:
                _say(unwrapped(model), left, one.strict)


def _left(model: nn.Module, since: int) -> Break | None:
    """Why dynamo has left the model's forward to Python; None where it has not."""
    code = getattr(getattr(model.forward, "__func__", model.forward), "__code__", None)
    place = None if code is None else (code.co_filename, code.co_firstlineno)
    return next((found for found in left_since(since) if found.function == place), None)


def _say(model: nn.Module, left: Break, strict: bool) -> None:
    file, line = left.places[0]
    text = (f"no graph of {type(model).__name__} is compiled, and nothing of it quantised: dynamo leaves its forward "
            f"to Python ({left.why}, {file}:{line}). Move what it cannot trace into a function or a module of its own; "
            "quartet.explain(model, …) shows what is quantised then")
    if strict:
        raise UnsupportedMatmul(f"strict=True, and {text}")
    warnings.warn(f"quartet: {text}", stacklevel=2)
