"""When optimizers have stepped."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


class Steps:
    """Counts the steps of all optimizers: a kernel that writes a parameter need not move its version counter."""

    def __init__(self) -> None:
        self.number, self._watching = 0, False

    def watch(self) -> None:
        """Count from now on."""
        if not self._watching:
            self._watching = True
            register_optimizer_step_post_hook(self._after_step)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.number += 1


STEPS = Steps()
