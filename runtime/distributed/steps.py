"""Which parameters optimizers have stepped."""

from __future__ import annotations

import torch
from torch import Tensor

from quartet.runtime.optimizer_steps import OPTIMIZER_STEPS


class Steps:
    """When each parameter was stepped last: a kernel that writes one need not move its version counter."""

    def __init__(self) -> None:
        self._last: dict[int, int] = {}  # by id of the parameter

    def watch(self) -> None:
        """Note it from now on."""
        OPTIMIZER_STEPS.after_each(self._note)

    def of(self, parameter: Tensor) -> tuple[int, int, int]:
        """What changes with each step of the parameter, and with each that is compiled or has failed, which do not say
        of what."""
        return self._last.get(id(parameter), 0), OPTIMIZER_STEPS.compiled, OPTIMIZER_STEPS.failed

    def _note(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            self._last.update(dict.fromkeys(map(id, group["params"]), OPTIMIZER_STEPS.number))


STEPS = Steps()
