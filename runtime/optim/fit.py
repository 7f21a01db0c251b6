"""Whether gradients and states have the shape, sharding and device of their parameter, in words where they have not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from quartet.runtime.optim.layout import local

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NUMBERS = ("lr", "betas", "eps", "weight_decay", "momentum", "dampening", "nesterov", "maximize")


def called(groups: Sequence[dict[str, Any]], group: dict[str, Any], param: Tensor) -> str:
    """A parameter in words: by its name, where the optimizer was given names, else by its place."""
    at = next(i for i, p in enumerate(group["params"]) if p is param)
    if "param_names" in group:
        return f"parameter {group['param_names'][at]!r}"
    number = next((i for i, g in enumerate(groups) if g is group), None)
    return f"tensor {at}" if number is None else f"parameter {at} of group {number}"


Name = Callable[[], str]


def unlike(what: str, x: Tensor, name: Name, param: Tensor) -> str | None:
    """How ``what`` differs in shape or sharding from the parameter that it is of; None where it does not."""
    if tuple(x.shape) != tuple(param.shape):
        return f"{what} of {name()} has the shape {list(x.shape)}, the parameter itself {list(param.shape)}"
    if local(x).shape != local(param).shape:
        return f"{what} of {name()} is {_placed(x)}, the parameter itself {_placed(param)}"
    return None


def refuse_checkpoint(owner: str, defaults: Mapping[str, Any], checkpoint: Any) -> None:
    """Raise ValueError for what no optimizer's ``state_dict`` returned, or that of one with other numbers."""
    if not isinstance(checkpoint, Mapping) or not {"state", "param_groups"} <= checkpoint.keys():
        given = list(checkpoint) if isinstance(checkpoint, Mapping) else type(checkpoint).__name__
        raise ValueError(f"expected what state_dict() of {owner} returned, with the keys 'state' and 'param_groups', "
                         f"not {given}")
    for at, group in enumerate(checkpoint["param_groups"]):
        if lacking := [name for name in _NUMBERS if name in defaults and name not in group]:
            raise ValueError(f"group {at} of the checkpoint has no {', '.join(lacking)}, which {owner} needs, so it is "
                             f"of another optimizer; nothing was loaded. Load one of {owner}")


def refuse_dtype(owner: str, name: Name, param: Tensor) -> None:
    """Raise TypeError for a parameter, or its gradient, of a dtype that no kernel takes."""
    for what, x in (("", param), ("a gradient of ", param.grad)):
        if x is not None and x.dtype not in DTYPES:
            raise TypeError(f"{owner} takes float32, bfloat16 and float16, and {what}{name()} of shape {list(x.shape)} "
                            f"is {x.dtype}; use torch.optim for it, and torch.view_as_real for complex numbers; after "
                            "model.double() it is model.float() that leads back")


def refuse_gradient(owner: str, name: Name, param: Tensor) -> None:
    """Raise for a gradient that no step can take: RuntimeError if sparse, ValueError for another shape or device."""
    grad = param.grad
    assert grad is not None
    if grad.is_sparse:
        raise RuntimeError(f"{owner} does not take sparse gradients, and {name()} of shape {list(param.shape)} has "
                           "one; use torch.optim.SparseAdam, or sparse=False in the embedding")
    if (problem := unlike("the gradient", grad, name, param)) and not _same_whole(grad, param):
        raise ValueError(f"{problem}; call zero_grad() after a change of the parameter's data")
    if grad.device != param.device:
        raise ValueError(f"the gradient of {name()} is on {grad.device}, the parameter itself on {param.device}")


def refuse_state(key: str, x: Tensor, name: Name, param: Tensor) -> None:
    """Raise ValueError for a state that was made for other data of its parameter."""
    if problem := unlike(f"the state {key!r}", x, name, param):
        raise ValueError(f"{problem}; a state belongs to the shape that it was made for. Build a new optimizer for the "
                         "new shape, or let this parameter begin anew by optimizer.state.pop(parameter)")
    if x.device != param.device:
        raise ValueError(f"the state {key!r} of {name()} is on {x.device}, the parameter itself on {param.device}; "
                         "optimizer.load_state_dict(optimizer.state_dict()) moves states to their parameters")


def _same_whole(grad: Tensor, param: Tensor) -> bool:
    """Whether a gradient is only sharded otherwise than its parameter, which a step undoes."""
    return isinstance(grad, DTensor) and isinstance(param, DTensor) and grad.shape == param.shape


def _placed(x: Tensor) -> str:
    if not isinstance(x, DTensor):
        return f"a plain tensor of shape {list(x.shape)}"
    return f"a DTensor {list(x.placements)} with {list(local(x).shape)} on this rank"
