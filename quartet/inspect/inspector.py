"""An inspector: what is recorded of a model's numbers while it trains, and when."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from quartet.inspect.statistics import Statistics
from quartet.lowering.recipe.types import Recipe
from quartet.recipes import resolve
from quartet.runtime.inspect.recorder import Recorder, Row


class Inspector:
    """Records statistics of every operand of every quantised product, and of every gradient.

        inspector = quartet.inspect.Inspector(every=50, what_if=["mxfp8", "nvfp4"])
        model = torch.compile(model, backend="quartet", options={"inspect": inspector})
        …
        print(inspector.statistics())

    Args:
        every: steps from one that is recorded to the next, the first among them; may be changed while the model trains.
            A step is what an optimizer does; without one, a forward.
        what_if: a recipe or several, or names of them, whose error on the same tensors is recorded too.
        keep: how many rows are kept, the latest; a layer has about ten a step.

    Raises:
        PolicyError: no such recipe. ValueError: an interval that is not, or a recipe whose error what-if cannot tell.
    """

    def __init__(self, every: int = 100, what_if: str | Recipe | Iterable[str | Recipe] = (),
                 keep: int = 200_000) -> None:
        if not isinstance(keep, int) or keep < 1:
            raise ValueError(f"keep is a number of rows, 1 or more, not {keep!r}")
        several = (what_if,) if isinstance(what_if, str | Recipe) else what_if
        self.recipes = tuple(_measurable(resolve(recipe)) for recipe in several)
        self.recorder = Recorder(_interval(every), keep)

    @property
    def every(self) -> int:
        return self.recorder.every

    @every.setter
    def every(self, steps: int) -> None:
        self.recorder.every = _interval(steps)

    def loss(self, value: torch.Tensor | float) -> None:
        """Note the loss of this step, for :meth:`Statistics.spikes`; a tensor is not waited for."""
        if not isinstance(value, torch.Tensor):
            value = torch.tensor(value, dtype=torch.float64, device="cpu")
        value = value.detach()
        self.recorder.put(Row(self.recorder.step, "loss", ("loss",), value.double().reshape(1)))

    def statistics(self) -> Statistics:
        """What has been recorded, fetched from the devices."""
        return Statistics.of(self.recorder.rows())

    def clear(self) -> None:
        """Forget what has been recorded, and count steps from 0."""
        self.recorder.clear()

    def key(self) -> str:
        """What of it the compiled graphs depend on."""
        return repr(self.recipes)

    def __repr__(self) -> str:
        names: Sequence[str] = [recipe.name for recipe in self.recipes]
        return f"Inspector(every={self.every}, what_if={names})"


def _interval(every: Any) -> int:
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"every is a number of steps, 1 or more, not {every!r}")
    return every


def _measurable(recipe: Recipe | None) -> Recipe:
    if recipe is None or not recipe.quantizes:
        raise ValueError(f"what_if takes recipes that quantise products, not {recipe and recipe.name!r}")
    if recipe.outliers is not None or any(gemm is not None and gemm.outer is not None
                                          for gemm in (recipe.fprop, recipe.dgrad, recipe.wgrad)):
        raise ValueError(f"what_if cannot tell the error of recipe {recipe.name!r}, which takes outliers apart or "
                         "transforms rows; compile the model with it")
    return recipe


_DEFAULT = Inspector()


def default() -> Inspector:
    """The inspector of ``options={"inspect": every}``."""
    return _DEFAULT


def coerce(value: object) -> Inspector | None:
    """An inspector from what an option is given: one, None, True, or every how many steps the default one records.

    Raises:
        TypeError, ValueError: something else.
    """
    if value is None or value is False or isinstance(value, Inspector):
        return None if value is False else value
    if value is True:
        return _DEFAULT
    if isinstance(value, int):
        _DEFAULT.every = value
        return _DEFAULT
    raise TypeError(f"expected a quartet.inspect.Inspector, True, or every how many steps, not {type(value).__name__} "
                    f"{value!r}")


_CHECKED: WeakKeyDictionary[nn.Module, Recorder] = WeakKeyDictionary()


def recorder_of(inspector: Inspector | None, model: nn.Module | None) -> Recorder:
    """Where the graphs of a model record; without an inspector all of them what ``check="finite"`` notes."""
    if inspector is not None:
        return inspector.recorder
    return Recorder() if model is None else _CHECKED.setdefault(model, Recorder())
