"""Which step of training runs: how often a forward has begun after an optimizer of ``torch.optim``'s kind has stepped.

Several optimizers that step one after the other are one step, micro-batches before it belong to it, and a compiled
step counts too.
"""

from __future__ import annotations

from quartet.runtime.optimizer_steps import OPTIMIZER_STEPS


class Clock:
    """The steps of this process since it began to watch."""

    def __init__(self) -> None:
        self._seen = self._steps = 0

    def watch(self) -> None:
        """Learn of optimizer steps from now on."""
        OPTIMIZER_STEPS.watch()

    def now(self) -> int:
        """The step to which a forward that begins now belongs."""
        if self._seen != OPTIMIZER_STEPS.number:
            self._seen = OPTIMIZER_STEPS.number
            self._steps += 1
        return self._steps


CLOCK = Clock()
