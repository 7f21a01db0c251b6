"""What training keeps in memory: between forward and backward, and from step to step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor


def saved_for_backward(compiled: Callable[..., Tensor], model: nn.Module, *inputs: Tensor) -> int:
    """Bytes of the distinct storages that one forward saves, beside those that live anyway.

    Parameters, buffers and the inputs themselves are not counted, copies of them (a packed weight) are. Call it
    after a first step: with hooks in place a compilation may differ.

    Args:
        compiled: the compiled form of ``model``, called as ``compiled(*inputs)``.
    """
    alive = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *inputs)}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in alive:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = compiled(*inputs)
    if not loss.requires_grad:
        raise ValueError("the forward saved nothing, its output needs no gradient; measure with gradients enabled")
    return sum(kept.values())


def stored_bytes(states: Mapping[Tensor, Mapping[str, Any]]) -> int:
    """Bytes of all tensors in an optimizer's ``state``: moments, scales, steps."""
    return sum(x.nbytes for state in states.values() for x in state.values() if isinstance(x, Tensor))
