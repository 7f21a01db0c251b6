"""Low-precision training as a compiler pass: ``torch.compile(model, backend="quartet")``.

Nothing is imported before it is used, neither PyTorch nor the modules ``quartet.optim``, ``direct``, ``extend``,
``inspect`` and ``distributed``.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quartet.compile import compile
    from quartet.explain import explain
    from quartet.extend import register_pass, unregister_pass
    from quartet.inspect.replay import replay
    from quartet.inspect.suggest import suggest
    from quartet.kernels.spec import QuantSpec, SpecError
    from quartet.lowering.recipe.types import Delayed, Gemm, Operand, Recipe, Rotation, Saved
    from quartet.policy import Policy, Rule
    from quartet.recipes import PolicyError, recipes, register
    from quartet.runtime.slots.state import load_state_dict, state_dict
    from quartet.runtime.slots.stateful import State
    from quartet.statistics import statistics

__version__ = "0.1.0"
__all__ = ["Delayed", "Gemm", "Operand", "Policy", "PolicyError", "QuantSpec", "Recipe", "Rotation", "Rule", "Saved",
           "SpecError", "State", "compile", "explain", "load_state_dict", "recipes", "register", "register_pass",
           "replay", "state_dict", "statistics", "suggest", "unregister_pass"]

_HOMES = {
    "quartet.compile": ("compile",), "quartet.explain": ("explain",), "quartet.statistics": ("statistics",),
    "quartet.extend": ("register_pass", "unregister_pass"), "quartet.kernels.spec": ("QuantSpec", "SpecError"),
    "quartet.lowering.recipe.types": ("Delayed", "Gemm", "Operand", "Recipe", "Rotation", "Saved"),
    "quartet.policy": ("Policy", "Rule"), "quartet.recipes": ("PolicyError", "recipes", "register"),
    "quartet.runtime.slots.state": ("load_state_dict", "state_dict"), "quartet.runtime.slots.stateful": ("State",),
    "quartet.inspect.replay": ("replay",), "quartet.inspect.suggest": ("suggest",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
_MODULES = ("direct", "distributed", "extend", "inspect", "optim")


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = globals()[name] = getattr(import_module(_HOME[name]), name)
        return value
    if name in _MODULES and find_spec(f"quartet.{name}") is not None:
        return import_module(f"quartet.{name}")
    raise AttributeError(f"module 'quartet' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_MODULES})


class _Package(ModuleType):
    """A package in which ``explain`` and its like stay functions when the modules of the same names are imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
