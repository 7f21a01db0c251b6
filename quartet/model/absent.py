"""Models on the meta device, looked at as if their tensors were there."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.node import map_aggregate

from quartet.runtime import compat


@contextmanager
def standing_in(model: Any, inputs: Any) -> Iterator[tuple[Any, Any]]:
    """``model`` and its inputs; of a model on the meta device a copy whose tensors are fake ones of a CPU, as are then
    those of the inputs. Inductor takes no graph of meta tensors. Nothing is allocated."""
    tensors = list(chain(model.parameters(), model.buffers())) if isinstance(model, nn.Module) else []
    if not any(tensor.is_meta for tensor in tensors):
        yield model, inputs
        return
    with compat.FakeTensorMode():
        copied = copy.deepcopy(model, {id(tensor): _fake(tensor) for tensor in tensors})
        yield copied, map_aggregate(inputs, lambda value: _fake(value) if isinstance(value, Tensor) else value)


def _fake(tensor: Tensor) -> Tensor:
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(made, tensor.requires_grad)
    return made.requires_grad_(tensor.requires_grad)
