"""``torch.nn.functional.linear`` of a low-bit weight: an integer product forward, the exact gradient backward."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from quartet.runtime.direct.once import once

ACTIVATIONS = ("int8", None)
_EPSILON = 1e-5  # of BitNet: the smallest magnitude that a token's scale is made of


class Weight(Protocol):
    """What a product asks of a low-bit weight ``[out, in]``; see :class:`.weight.LowBitWeight`."""

    shape: torch.Size
    dtype: torch.dtype
    activations: str | None

    def unpacked(self) -> Tensor: ...

    def dequantize(self) -> Tensor: ...

    def row_steps(self) -> Tensor: ...


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes of ``[tokens, in]`` to nearest even and fp32 scales ``[tokens, 1]``: absmax/127 of each token.

    A NaN or an infinity makes its token's scale a NaN, and so all its products.
    """
    x = x.to(torch.float32)
    amax = x.abs().amax(1, keepdim=True)
    scale = amax.clamp(min=_EPSILON) * (1.0 / 127.0)
    codes = (x / scale).round().clamp(-127, 127)
    scale = torch.where(amax < float("inf"), scale, float("nan"))
    return torch.where(codes == codes, codes, 0.0).to(torch.int8), scale


def int_product(a: Tensor, b: Tensor) -> Tensor:
    """int32 ``a · bᵀ`` of int8 ``[m, k]`` and ``[n, k]``, padded where the GPU's GEMM asks for it."""
    (m, k), n = a.shape, b.shape[0]
    if k == 1:  # of which a CPU's _int_mm reads the second factor wrongly (torch 2.11 and 2.13)
        return a.to(torch.int32) * b.to(torch.int32).t()
    if a.device.type == "cuda":
        rows, inner, cols = max(0, 32 - m), -k % 8, -n % 8
        a = torch.nn.functional.pad(a, (0, inner, 0, rows)) if rows or inner else a
        b = torch.nn.functional.pad(b, (0, inner, 0, cols)) if cols or inner else b
        return torch.ops.aten._int_mm(a, b.t())[:m, :n]
    return torch.ops.aten._int_mm(a, b.t())


class _Int8Linear(torch.autograd.Function):
    """Activations INT8 a token; what is kept for backward are their codes, one byte each.

    ``gX = (E · step) · codes`` passes straight through the rounding of the activations, ``gW = Eᵀ · X̂`` is the gradient
    of the dequantised weight with respect to the product that was computed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        codes, scale = quantize_tokens(flat)
        product = int_product(codes, weight.unpacked()).to(torch.float32)
        out = product * scale * weight.row_steps()
        if bias is not None:
            out = out + bias.to(torch.float32)
        ctx.save_for_backward(codes, scale, weight)
        ctx.has_bias, ctx.dtype = bias is not None, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out.to(dtype).reshape(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once("second derivatives through INT8 activations are not defined: rounding has none, and backward passes "
          "straight through it; convert the layers that need them with activations=None, whose derivatives of any "
          "order are right")
    def backward(ctx: Any, *grads: Tensor) -> Any:
        codes, scale, weight = ctx.saved_tensors
        grad = grads[0]
        e = grad.reshape(-1, grad.shape[-1])
        gx = gw = gb = None
        if ctx.needs_input_grad[0]:
            gx = grad_input(e, weight).to(ctx.dtype).reshape(*grad.shape[:-1], weight.shape[1])
        if ctx.needs_input_grad[1]:
            gw = (e.t() @ (codes.to(torch.float32) * scale).to(e.dtype)).to(weight.dtype)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            gb = e.to(torch.float32).sum(0).to(ctx.bias_dtype)
        return gx, gw, gb, None


class _FloatLinear(torch.autograd.Function):
    """Activations as they are, times the dequantised weight: a product that a policy of the backend may quantise.

    What is kept are x and the weight's codes, and backward is made of functions of both that can be differentiated:
    derivatives of any order are right.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        out = x.reshape(-1, x.shape[-1]) @ weight.dequantize().to(x.dtype).t()
        if bias is not None:
            out = out + bias.to(x.dtype)
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out.reshape(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        grad = grads[0]
        e = grad.reshape(-1, grad.shape[-1])
        gx = gw = gb = None
        if ctx.needs_input_grad[0]:
            gx = _transposed(grad, weight).to(x.dtype)
        if ctx.needs_input_grad[1]:
            gw = (e.t() @ x.reshape(-1, x.shape[-1]).to(e.dtype)).to(weight.dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            gb = e.to(torch.promote_types(e.dtype, torch.float32)).sum(0).to(ctx.bias_dtype)
        return gx, gw, gb


class _Transposed(torch.autograd.Function):
    """``E · W`` of ``E [..., out]``, in E's dtype."""

    @staticmethod
    def forward(ctx: Any, e: Tensor, weight: Weight) -> Tensor:
        ctx.save_for_backward(e, weight)
        return _times(e, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        e, weight = ctx.saved_tensors
        grad = grads[0]
        ge = gw = None
        if ctx.needs_input_grad[0]:
            ge = _FloatLinear.apply(grad, weight, None).to(e.dtype)
        if ctx.needs_input_grad[1]:
            gw = (e.reshape(-1, e.shape[-1]).t() @ grad.reshape(-1, grad.shape[-1]).to(e.dtype)).to(weight.dtype)
        return ge, gw


def _transposed(e: Tensor, weight: Weight) -> Tensor:
    """A compiled backward is a graph of plain operations: it is never differentiated again."""
    return _times(e, weight) if torch.compiler.is_compiling() else _Transposed.apply(e, weight)


def _times(e: Tensor, weight: Weight) -> Tensor:
    return (e.reshape(-1, e.shape[-1]) @ weight.dequantize().to(e.dtype)).reshape(*e.shape[:-1], weight.shape[1])


def grad_input(e: Tensor, weight: Weight) -> Tensor:
    """``E · W`` in E's dtype: codes are exact there, so only E times the row's step rounds."""
    return (e.to(torch.float32) * weight.row_steps()).to(e.dtype) @ weight.unpacked().to(e.dtype)


def linear(input: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """``input · Wᵀ + bias``, ``[..., in]`` → ``[..., out]`` in the input's dtype, or autocast's."""
    if input.shape[-1] != weight.shape[1]:
        raise ValueError(f"linear: the input {list(input.shape)} has {input.shape[-1]} features, the low-bit weight "
                         f"{list(weight.shape)} takes {weight.shape[1]}")
    kind = input.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
    if weight.activations == "int8":
        return _Int8Linear.apply(input, weight, bias, dtype)
    return _FloatLinear.apply(input.to(dtype), weight, bias)
