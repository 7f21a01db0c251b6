"""Backwards that are differentiated once: autograd would leave parts out of their derivatives, which are refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., Any]


def once(why: str) -> Callable[[Backward], Backward]:
    """Make a Function's backward raise RuntimeError, with ``why``, where its results are differentiated.

    ``torch.autograd.function.once_differentiable`` does so only if the incoming gradient has a graph; here the weight
    alone may be what a second derivative is asked of. Compiled code is left as it is: AOTAutograd refuses by itself.
    """

    def decorate(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def wrapped(ctx: Any, *grads: Tensor) -> Any:
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return backward(ctx, *grads)
            with torch.no_grad():
                found = backward(ctx, *grads)
            anchor = torch.ones((), dtype=torch.float32, device="cpu", requires_grad=True)
            return tuple(None if x is None else _Refused.apply(x, anchor, why) for x in found)

        return wrapped

    return decorate


class _Refused(torch.autograd.Function):
    """A tensor as it is, which says that it needs a gradient and has none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, why: str) -> Tensor:
        ctx.why = why
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(ctx.why)
