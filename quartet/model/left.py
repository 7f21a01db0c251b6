"""Models of ``quartet.compile`` that dynamo leaves to Python, so that no backend is asked for anything.

It leaves a whole function where a graph would have to end at a place that it cannot go on from, as inside of a loop or
a ``try``. If that is the model's forward, and no layer's own is compiled, the model trains as it is. And it compiles no
function more often than ``recompile_limit``: what comes after that runs as it is too. The next step of an optimizer
that holds the model's parameters says either, once.

A mode or a transform in which a model was called once takes it from dynamo for good; a step of an optimizer ends that.
Whether more than a call was so, the second step tells by a reason of dynamo's.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import CodeType
from weakref import WeakSet, ref

from torch import nn
from torch.optim import Optimizer

from quartet.model.names import Names, unwrapped
from quartet.passes.plan.plan import UnsupportedMatmul
from quartet.runtime.breaks import PASSING, Break, go_on, left_since, now
from quartet.runtime.optimizer_steps import OPTIMIZER_STEPS


@dataclass
class _Expected:
    """A model that graphs are expected of. ``since``: when it was compiled. ``met``: there was one. ``stepped``: what
    has stepped it without a graph and a lasting reason for none."""

    model: ref[nn.Module]
    strict: bool
    since: int
    met: bool = False
    stepped: WeakSet[Optimizer] = field(default_factory=WeakSet)


_expected: dict[int, _Expected] = {}
_LIMIT = "recompile limit"


def expect(model: nn.Module, strict: bool) -> None:
    """Look after steps of the model's parameters whether there were graphs of it."""
    _expected[id(model)] = _Expected(ref(model), strict, now())
    OPTIMIZER_STEPS.after_each(_after_step)


def met(names: Names) -> None:
    """There is a graph of the model that gives these names, or of a part of it."""
    OPTIMIZER_STEPS.after_each(_after_step)
    for number, one in list(_expected.items()):
        model = one.model()
        parts: Iterable[nn.Module] = () if model is None else nn.Module.modules(model)
        if model is None:
            _expected.pop(number, None)
        elif not one.met:
            one.met = any(part is names.compiled or part is names.model for part in parts)


def _after_step(optimizer: Optimizer) -> None:
    try:
        _look(optimizer)
    finally:
        waiting = [(one.model(), one.since) for one in list(_expected.values()) if one.stepped and not one.met]
        go_on((code, since) for model, since in waiting
              if model is not None and (code := _code(unwrapped(model))) is not None)


def _look(optimizer: Optimizer) -> None:
    breaks = left_since(0) if _expected else []
    for number, one in list(_expected.items()):
        model = one.model()
        if model is None:
            _expected.pop(number, None)
            continue
        left = _left(unwrapped(model), one, breaks)
        if (left is None and one.met) or not _holds(optimizer, model):
            continue
        if (left is None or PASSING in left.why) and optimizer not in one.stepped:
            one.stepped.add(optimizer)
            continue
        _expected.pop(number, None)
        if left is not None:
            _say(unwrapped(model), left, one)


def _holds(optimizer: Optimizer, model: nn.Module) -> bool:
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return not stepped.isdisjoint(map(id, model.parameters()))


def _left(model: nn.Module, one: _Expected, breaks: Sequence[Break]) -> Break | None:
    """Why dynamo has left the model's forward to Python, or, where there are graphs, a module's that it has compiled as
    often as it does; None where it has not."""
    found = [left for left in breaks if left.began >= one.since and (not one.met or _LIMIT in left.why)]
    modules = nn.Module.modules(model) if one.met and found else (model,)
    places = {_place(module) for module in modules} if found else set()
    return next((left for left in found if left.function in places), None)


def _place(module: nn.Module) -> tuple[str, int] | None:
    code = _code(module)
    return None if code is None else (code.co_filename, code.co_firstlineno)


def _code(module: nn.Module) -> CodeType | None:
    return getattr(getattr(module.forward, "__func__", module.forward), "__code__", None)


def _say(model: nn.Module, left: Break, one: _Expected) -> None:
    file, line = left.places[0]
    if one.met:
        text = (f"parts of {type(model).__name__} run unquantised from now on: {left.why} ({file}:{line}), so dynamo "
                "compiles that function for nothing new. Raise torch._dynamo.config.recompile_limit, or compile with "
                'dynamic=True; TORCH_LOGS="recompiles" says what differs')
    else:
        text = (f"no graph of {type(model).__name__} is compiled, and nothing of it quantised: dynamo leaves its "
                f"forward to Python ({left.why}, {file}:{line}). Move what it cannot trace into a function or a module "
                "of its own; quartet.explain(model, …) shows what is quantised then")
    if one.strict:
        raise UnsupportedMatmul(f"strict=True, and {text}")
    warnings.warn(f"quartet: {text}", stacklevel=2)
