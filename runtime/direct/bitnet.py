"""The baseline: BitNet b1.58 (arXiv 2402.17764), ternary in the forward over weights in high precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quartet.runtime.direct.convert import SKIPPED, Skip, _chosen, check_model
from quartet.runtime.direct.linear import int_product, quantize_tokens
from quartet.runtime.direct.once import once

_EPSILON = 1e-5


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        codes, scale = quantize_tokens(x.reshape(-1, x.shape[-1]))
        mean = weight.to(torch.float32).abs().mean().clamp(min=_EPSILON)
        ternary = (weight.to(torch.float32) / mean).round().clamp(-1, 1).to(torch.int8)
        out = int_product(codes, ternary).to(torch.float32) * scale * mean
        if bias is not None:
            out = out + bias.to(torch.float32)
        ctx.save_for_backward(codes, scale, ternary, mean)
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        return out.to(dtype).reshape(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once("second derivatives of a BitLinear are not defined: its rounding has none, and backward passes straight "
          "through it; keep the layers whose second derivatives are needed an nn.Linear, by skip=")
    def backward(ctx: Any, *grads: Tensor) -> Any:
        codes, scale, ternary, mean = ctx.saved_tensors
        grad, (of_x, of_w, of_b) = grads[0], ctx.dtypes
        e = grad.reshape(-1, grad.shape[-1])
        gx = ((e.to(torch.float32) * mean).to(e.dtype) @ ternary.to(e.dtype)).to(of_x)
        gw = (e.t() @ (codes.to(torch.float32) * scale).to(e.dtype)).to(of_w)
        gb = None if of_b is None else e.to(torch.float32).sum(0).to(of_b)
        return gx.reshape(*grad.shape[:-1], ternary.shape[1]), gw, gb, None


class BitLinear(nn.Linear):
    """``nn.Linear`` whose forward is ternary · INT8: weights absmean a tensor, activations absmax a token."""

    def forward(self, input: Tensor) -> Tensor:
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        return _StraightThrough.apply(input, self.weight, self.bias, dtype)


def bitnet(model: nn.Module, *, skip: Skip = SKIPPED) -> nn.Module:
    """Train the chosen linear layers by the straight-through estimator, in place; arguments as of ``convert``."""
    check_model("bitnet", model)
    chosen = list(_chosen(model, skip))
    if not chosen:
        raise ValueError("no layer to convert; give skip=() to take all linear layers")
    for _, layer in chosen:
        layer.__class__ = BitLinear
    return model
