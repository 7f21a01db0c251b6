"""Moving averages of weights, and the ops that advance and read them.

    average_advance(anchor, w, weight, name, decay)    average ← decay·average + (1 − decay)·w, where it is due
    average_read(anchor, w, weight, name, decay)       the average, fp32 and of the shape of w; advances nothing

The first of them starts an average at w. As with histories of magnitudes (``quartet.runtime.amax``) a graph finds its
state through its anchor: ``weight`` is the input of the graph that is the parameter, ``name`` tells apart what is made
of one parameter. An average is due at every forward of a training graph; once an optimizer of ``torch.optim``'s kind
has stepped the parameter, it is due at the first forward after each step. Forwards without a backward read the average
as the next training step will have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from quartet.runtime.amax import library, weight_of


@dataclass(eq=False)
class Average:
    """fp32 ``value``, shaped like a weight.

    ``due``: the next forward advances it. ``counted``: an optimizer tells when.
    """

    value: Tensor
    due: bool = True
    counted: bool = False


class Averages:
    """All averages of this process, by parameter and name; they live as long as their parameter."""

    def __init__(self) -> None:
        self.of_weight: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._watching = False

    def of(self, weight: Tensor) -> dict[str, Average]:
        """name → average of a parameter."""
        return self.of_weight.get(weight, {})

    def put(self, weight: Tensor, averages: Mapping[str, Average]) -> None:
        """Replace the averages of a parameter."""
        if not self._watching:
            self._watching = True
            register_optimizer_step_post_hook(self._after_step)
        self.of_weight[weight] = dict(averages)

    def find(self, weight: Tensor, name: str, w: Tensor) -> Average | None:
        """The average of ``w``, on its device; None where there is none of its shape yet."""
        found = self.of(weight).get(name)
        if found is None or found.value.shape != w.shape:
            return None
        found.value = found.value.to(w.device)
        return found

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        for group in optimizer.param_groups:
            for weight in group["params"]:
                for average in self.of(weight).values():
                    average.due = average.counted = True


AVERAGES = Averages()
_TAGS = (torch.Tag.cudagraph_unsafe,)  # a replayed graph would not ask what is due
library.define("average_advance(Tensor(a!) anchor, Tensor w, int weight, str name, float decay) -> ()", tags=_TAGS)
library.define("average_read(Tensor anchor, Tensor w, int weight, str name, float decay) -> Tensor", tags=_TAGS)


@torch.no_grad()
def _advance(anchor: Tensor, w: Tensor, weight: int, name: str, decay: float) -> None:
    parameter = weight_of(anchor, weight)
    if parameter is None:
        return
    average = AVERAGES.find(parameter, name, w)
    if average is None:
        with torch.inference_mode(False):
            average = Average(w.to(torch.float32, copy=True).contiguous())
        AVERAGES.put(parameter, {**AVERAGES.of(parameter), name: average})
    elif average.due:
        average.value.lerp_(w.to(torch.float32), 1.0 - decay)
    average.due = not average.counted


@torch.no_grad()
def _read(anchor: Tensor, w: Tensor, weight: int, name: str, decay: float) -> Tensor:
    parameter = weight_of(anchor, weight)
    average = None if parameter is None else AVERAGES.find(parameter, name, w)
    current = w.to(torch.float32, copy=True).contiguous()
    if average is None:
        return current
    return average.value.lerp(current, 1.0 - decay) if average.counted and average.due else average.value.clone()


for _name, _impl, _fake in (
    ("average_advance", _advance, lambda anchor, w, weight, name, decay: None),
    ("average_read", _read, lambda anchor, w, weight, name, decay: w.new_empty(w.shape, dtype=torch.float32)),
):
    library.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"quartet::{_name}", _fake, lib=library)

AVERAGE_ADVANCE = torch.ops.quartet.average_advance.default
AVERAGE_READ = torch.ops.quartet.average_read.default
