"""The steps of all optimizers of ``torch.optim``'s kind in this process: one count, and who is told.

Fused kernels write parameters without moving their version counters, so that only the optimizer's hook tells that they
have changed. Dynamo compiles the hook along with a compiled step: all that happens then is that :attr:`within` is
emptied and the step noticed. A step that was captured in a CUDA graph is noticed when it is captured, not when it is
replayed. A step that fails is not counted and nobody is told of it, but it may have written parameters before: whoever
looks next finds that it never ended.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from quartet.runtime.compat import after_backward, backward_number
from quartet.runtime.frames import optimizer_steps

Told = Callable[[Optimizer], None]


class OptimizerSteps:
    """Counts from the first time that anybody watches."""

    def __init__(self) -> None:
        self._within: dict[Hashable, Any] = {}
        self._uncounted = self._watching = self._begun = False
        self._eager = self._compiled = self._failed = 0
        self._before: list[Told] = []
        self._after: list[Told] = []
        self._at_the_end: list[Callable[[], None]] = []
        self._queued_in: int | None = None

    def watch(self) -> None:
        """Count from now on."""
        if not self._watching:
            self._watching = True
            register_optimizer_step_pre_hook(self._begins)
            register_optimizer_step_post_hook(self._has_stepped)

    @property
    def within(self) -> dict[Hashable, Any]:
        """What others keep until an optimizer steps, by a key of theirs. Each step replaces it by an empty one, when it
        ends or has failed."""
        self._look()
        return self._within

    @property
    def failed(self) -> int:
        """How many steps have begun and not ended, which may have written some of their parameters; several between two
        looks count once."""
        self._look()
        return self._failed

    @property
    def writes(self) -> tuple[int, int]:
        """What changes with each step that has written parameters, or may have: one that has ended, or failed."""
        return self.number, self.failed

    def _look(self) -> None:
        if self._begun and not optimizer_steps(sys._getframe()):
            self._begun = False
            self._failed += 1
            self._within = {}

    @property
    def number(self) -> int:
        """How many steps there were; compiled ones between two looks at it count once."""
        return self.compiled + self._eager

    @property
    def compiled(self) -> int:
        """How many of them were compiled: whose they are is not known."""
        if self._uncounted:
            self._uncounted = False
            self._compiled += 1
        return self._compiled

    def before_each(self, call: Told) -> None:
        """``call(optimizer)`` before a step that is not compiled, which does not begin where it raises."""
        self._add(self._before, call)

    def after_each(self, call: Told) -> None:
        """``call(optimizer)`` after a step that is not compiled; where one raises, the others are called too."""
        self._add(self._after, call)

    def at_the_end(self, call: Callable[[], None]) -> None:
        """``call()`` once, for what :meth:`after_each` calls: when the step that others step inside of has ended, and
        the backward that steps parameters one by one."""
        if call not in self._at_the_end:
            self._at_the_end.append(call)

    def _add(self, calls: list[Told], call: Told) -> None:
        if call not in calls:
            calls.append(call)
        self.watch()

    def _begins(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not torch.compiler.is_compiling():
            for call in tuple(self._before):
                call(optimizer)
            self._begun = True

    def _has_stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._within = {}  # nothing is read before, so that dynamo repeats just this after each run of a compiled step
        if torch.compiler.is_compiling():
            self._uncounted = True
            return
        self._eager += 1
        self._begun = optimizer_steps(sys._getframe()) > 1  # inside of another, which has not ended
        _call_all(self._after, optimizer)
        if self._at_the_end and not self._begun:
            self._wait_for_backward()

    def _wait_for_backward(self) -> None:
        backward = backward_number()
        if backward is None:
            self._end()
        elif self._queued_in != backward:  # one that fails calls nothing of what it was given
            self._queued_in = backward
            after_backward(self._end)

    def _end(self) -> None:
        calls, self._at_the_end, self._queued_in = self._at_the_end, [], None
        _call_all(calls)


def _call_all(calls: Sequence[Callable[..., None]], *arguments: Any) -> None:
    """Each of them, in this order; the last error is raised after that, with those before it in its context."""
    with ExitStack() as stack:
        for call in reversed(calls):
            stack.callback(call, *arguments)


OPTIMIZER_STEPS = OptimizerSteps()
