"""When a shard has changed, and when what was made of it is ready on another stream."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
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


class Mark:
    """A point in the work of the current stream of a device, which tensors were made before."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._event = None if self._stream is None else self._stream.record_event()

    def follow(self, tensors: Iterable[Tensor]) -> None:
        """Let the current stream read them."""
        if self._stream is None or self._event is None:
            return
        current = torch.cuda.current_stream(self._stream.device)
        if current != self._stream:
            current.wait_event(self._event)
            for tensor in tensors:
                tensor.record_stream(current)


STEPS = Steps()
