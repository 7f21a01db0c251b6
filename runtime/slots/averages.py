"""Moving averages of weights, and what advances and reads them: the ops ``average_advance`` and ``average_read``.

    advance(anchor, w, weight, name, decay)    average ← decay·average + (1 − decay)·w, where it is due
    read(anchor, w, weight, name, decay)       the average, fp32 and of the shape of w; advances nothing

The first of them starts an average at w. As with histories of magnitudes (``quartet.runtime.slots.amax``) a graph
finds its state through its anchor: ``weight`` is the input of the graph that is the parameter, ``name`` tells apart
what is made of one parameter. An average is due in every forward of a training graph; once an optimizer of
``torch.optim``'s kind has stepped its weight, in the first after each step. Forwards without a backward read the
average as the next training step will have it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quartet.runtime.compat import backward_number
from quartet.runtime.slots.amax import weight_of
from quartet.runtime.slots.remembered import Counted, Weight


@dataclass(eq=False)
class Average(Counted):
    """fp32 ``value``, shaped like a weight."""

    value: Tensor


def average_of(weight: Weight, name: str, w: Tensor) -> Average | None:
    """The average of ``w``, on its device; None where there is none of its shape yet."""
    found = weight.averages.get(name)
    if found is None or found.value.shape != w.shape:
        return None
    found.value = found.value.to(w.device)
    return found


@torch.no_grad()
def advance(anchor: Tensor, w: Tensor, weight: int, name: str, decay: float) -> None:
    owner = weight_of(anchor, weight)
    if owner is None:
        return
    average = average_of(owner, name, w)
    if average is None:
        with torch.inference_mode(False), torch.no_grad():  # in this order: the former turns gradients on
            average = owner.averages[name] = Average(w.to(torch.float32, copy=True).contiguous())
    elif average.due and backward_number() is None:  # a forward that runs there is computed again
        average.value.lerp_(w.to(torch.float32), 1.0 - decay)
    average.due = not average.counted


@torch.no_grad()
def read(anchor: Tensor, w: Tensor, weight: int, name: str, decay: float) -> Tensor:
    owner = weight_of(anchor, weight)
    average = None if owner is None else average_of(owner, name, w)
    current = w.to(torch.float32, copy=True).contiguous()
    if average is None:
        return current
    return average.value.lerp(current, 1.0 - decay) if average.counted and average.due else average.value.clone()
