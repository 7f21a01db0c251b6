"""Which step of training runs: how often a forward has begun after an optimizer of ``torch.optim``'s kind has stepped.

Several optimizers that step one after the other are one step, micro-batches before it belong to it, and a compiled
step counts too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


class Clock:
    """The steps of this process since it began to watch."""

    def __init__(self) -> None:
        self._stepped = self._watching = False
        self._steps = 0
        self._before_step: list[Callable[[torch.optim.Optimizer], None]] = []

    def watch(self) -> None:
        """Learn of optimizer steps from now on."""
        if not self._watching:
            self._watching = True
            register_optimizer_step_pre_hook(self._before)
            register_optimizer_step_post_hook(self._after)

    def before_each_step(self, call: Callable[[torch.optim.Optimizer], None]) -> None:
        """``call(optimizer)`` before it changes weights; not before a compiled step, which nothing may interrupt."""
        self._before_step.append(call)

    def now(self) -> int:
        """The step to which a forward that begins now belongs."""
        if self._stepped:
            self._stepped = False
            self._steps += 1
        return self._steps

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not torch.compiler.is_compiling():
            for call in list(self._before_step):
                call(optimizer)

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._stepped = True  # dynamo repeats this after each run of a compiled step


CLOCK = Clock()
