"""What is remembered of each weight from step to step, and when it is due.

A history of magnitudes (``quartet.runtime.slots.amax``) and a moving average (``quartet.runtime.slots.averages``) are
due at every forward of a training graph; once an optimizer of ``torch.optim``'s kind has stepped their weight, they are
due at the first forward after each step, so that the micro-batches of a step count once. A compiled step is noticed as
well. One that is captured in a CUDA graph is not when it is replayed: what it steps is due at every forward from then
on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from quartet.runtime.slots.owners import ByParameter


@dataclass(eq=False)
class Counted:
    """``due``: the next forward advances it. ``counted``: an optimizer tells when."""

    due: bool = field(default=True, kw_only=True)
    counted: bool = field(default=False, kw_only=True)


@dataclass(eq=False)
class Weight:
    """What is remembered of a weight, by name; ``observed``: all steps of its optimizer are seen."""

    slots: dict[str, Any] = field(default_factory=dict)
    averages: dict[str, Any] = field(default_factory=dict)
    observed: bool = True

    def stepped(self) -> None:
        for kept in (*self.slots.values(), *self.averages.values()):
            kept.due, kept.counted = True, self.observed


class Weights:
    """All that is remembered in this process; it lives as long as its parameter."""

    def __init__(self) -> None:
        self.of: ByParameter[Weight] = ByParameter()
        self._compiled_step = False
        self._watching = False

    def of_all(self, parameters: Iterable[Tensor]) -> list[Weight]:
        """What is remembered of each parameter, from now on."""
        found = [(parameter, self.of.get(parameter)) for parameter in parameters]
        new = {id(parameter): (parameter, Weight()) for parameter, weight in found if weight is None}
        if new:
            self.of.put(list(new.values()))
        return [new[id(parameter)][1] if weight is None else weight for parameter, weight in found]

    def watch(self) -> None:
        """Learn of optimizer steps from now on."""
        if not self._watching:
            self._watching = True
            register_optimizer_step_post_hook(self._after_step)

    def after_compiled_steps(self) -> None:
        """Whatever optimizers count is due if a compiled one has stepped: it does not say which weights."""
        if self._compiled_step:
            self._compiled_step = False
            for weight in self.of.values():
                for kept in (*weight.slots.values(), *weight.averages.values()):
                    kept.due = True

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            self._compiled_step = True  # dynamo repeats this after each run of the compiled step
            return
        if not len(self.of):
            return
        captured = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                weight = self.of.get(parameter)
                if weight is not None:
                    weight.observed = weight.observed and not captured
                    weight.stepped()


WEIGHTS = Weights()
