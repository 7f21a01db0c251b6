"""What one step of every training program here is: the groups, the schedule, the update."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, lr: float) -> None:
    """One step of the optimizer along the gradients of ``loss``, clipped to a norm of 1."""
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first tenth, then a cosine down to a tenth of the peak."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def decayed(model: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups: weight decay .1 on matrices and none on norms."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


def adamw(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW(.9, .95) on the groups of ``decayed``."""
    return torch.optim.AdamW(decayed(model), lr=lr, betas=(0.9, 0.95), fused=True)
