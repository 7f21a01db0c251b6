"""The Quartet linear layer (arXiv 2505.14669), forward and backward, in eager PyTorch.

    fprop   Y  = Xq · Wqᵀ                                    Xq = Q((X ⊙ s)·H), Wq = Q((W ⊙ s)·H)
    dgrad   gX = (((G(E)  · G(Wqᵀ)ᵀ) ⊙ M_x) · H) ⊙ s         contracts `out`
    wgrad   gW = (((G(Eᵀ) · G(Xqᵀ)ᵀ) ⊙ M_w) · H) ⊙ s         contracts `tokens`

H is the fixed block Hadamard transform along `in`, s the fixed signs before it and Q a quantiser to nearest: by the
rule `even` under `FLAT_SIGNS`, or in the paper by `quest` without signs. M_x and M_w are the masks of a Q that has
them, as the paper's does. G is a block Hadamard transform with fresh random signs along the contraction axis, shared by
both operands of its GEMM, then a stochastic quantiser. Xq and Wq are read from the saved codes, so the gradient is
unbiased for the quantised forward and X itself is not kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quartet.kernels.reference.hadamard import FLAT_SIGNS, hadamard
from quartet.kernels.reference.philox import Draw, random_signs
from quartet.kernels.reference.quantize import apply_mask, dequantize, quantize, scaled_mm
from quartet.kernels.spec import QuantSpec

FORWARD = QuantSpec(rule="even")
BACKWARD = QuantSpec(rule="headroom", rounding="stochastic")
Signs = Sequence[int] | None


class Quantized(NamedTuple):
    """What is kept of an operand ``[rows, cols]``: the results of ``quantize`` after the rotation."""

    codes: Tensor
    scales: Tensor
    mask: Tensor


def linear_forward(x: Tensor, w: Tensor, spec: QuantSpec = FORWARD, n: int = 32,
                   signs: Signs = FLAT_SIGNS) -> tuple[Tensor, Quantized, Quantized]:
    """``Y = Xq · Wqᵀ`` and what backward needs.

    Args:
        x: ``[tokens, in]``; ``w``: ``[out, in]``, of the same float dtype. ``in`` is zero-padded.
        spec: quantiser of both operands, deterministic.
        n: Hadamard size along ``in``; signs: the ``n`` ±1 before it, or None.
    Returns:
        ``Y [tokens, out]`` of that dtype, and X and W quantised.
    Raises:
        ValueError: shapes, dtypes or the number of signs that do not agree, or a stochastic ``spec``.
    """
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1] or x.dtype != w.dtype:
        raise ValueError("x [tokens, in] and w [out, in] must agree in `in` and in dtype, got "
                         f"x {list(x.shape)} {x.dtype} and w {list(w.shape)} {w.dtype}; "
                         "flatten x to two axes and cast both to one dtype")
    if spec.stochastic:
        raise ValueError(f"forward quantiser '{spec}' is stochastic, but the forward draws no random bits; "
                         "use rounding='nearest'")
    s = _tensor(signs, n, x)
    xq = Quantized(*quantize(hadamard(x, n, s), spec))
    wq = Quantized(*quantize(hadamard(w, n, s), spec))
    return scaled_mm(xq.codes, xq.scales, wq.codes, wq.scales, spec, spec, x.dtype), xq, wq


def linear_backward(grad: Tensor, xq: Quantized, wq: Quantized, seed: Tensor, site: int, width: int,
                    forward_spec: QuantSpec = FORWARD, forward_n: int = 32, forward_signs: Signs = FLAT_SIGNS,
                    backward_spec: QuantSpec = BACKWARD, backward_n: int = 32) -> tuple[Tensor, Tensor]:
    """Gradients of x and w.

    Args:
        grad: ``E [tokens, out]``. ``out`` and ``tokens`` are zero-padded where they are contracted.
        xq, wq: from :func:`linear_forward` with ``forward_spec``, ``forward_n`` and ``forward_signs``.
        seed: int64 scalar tensor, fresh every step.
        site: which layer of the step this is, 0…2^28−1; see ``Draw`` for the bits it takes.
        width: ``in``, before padding.
        backward_spec: quantiser of all four operands; backward_n: Hadamard size along ``out`` and ``tokens``.
    Returns:
        ``gX [tokens, in]`` and ``gW [out, in]`` of grad's dtype.
    """
    forward_s = _tensor(forward_signs, forward_n, grad)
    w_t = dequantize(wq.codes, wq.scales, forward_spec).t()
    x_t = dequantize(xq.codes, xq.scales, forward_spec).t()

    def product(a: Tensor, b: Tensor, signs: Draw, a_draw: Draw, b_draw: Draw) -> Tensor:
        s = random_signs(seed, signs.of(site), backward_n)
        a_codes, a_scales, _ = quantize(hadamard(a, backward_n, s), backward_spec, seed, a_draw.of(site))
        b_codes, b_scales, _ = quantize(hadamard(b, backward_n, s), backward_spec, seed, b_draw.of(site))
        return scaled_mm(a_codes, a_scales, b_codes, b_scales, backward_spec, backward_spec, grad.dtype)

    def unrotate(g: Tensor, mask: Tensor) -> Tensor:
        g = apply_mask(g, mask) if forward_spec.mask else g
        return hadamard(g, forward_n, forward_s, inverse=True, dtype=grad.dtype)[:, :width]

    gx = product(grad, w_t, Draw.DGRAD_SIGNS, Draw.DGRAD_A, Draw.DGRAD_B)
    gw = product(grad.t(), x_t, Draw.WGRAD_SIGNS, Draw.WGRAD_A, Draw.WGRAD_B)
    return unrotate(gx, xq.mask), unrotate(gw, wq.mask)


def _tensor(signs: Signs, n: int, like: Tensor) -> Tensor | None:
    """fp32 ``[n]`` on the device of ``like``."""
    if signs is not None and len(signs) != n:
        raise ValueError(f"a rotation by H{n} needs {n} signs, got {len(signs)}; give signs of that length, or None")
    return None if signs is None else torch.tensor(signs, dtype=torch.float32, device=like.device)


class QuartetLinear(torch.autograd.Function):
    """``QuartetLinear.apply(x, w, seed, site[, forward_spec, forward_n, forward_signs, backward_spec, backward_n])``.

    The arguments are those of :func:`linear_forward` and :func:`linear_backward`. Kept for backward: packed
    codes, scales and masks of x and w, and the seed, so a recomputed forward gives the same gradient.
    """

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, seed: Tensor, site: int,
                forward_spec: QuantSpec = FORWARD, forward_n: int = 32, forward_signs: Signs = FLAT_SIGNS,
                backward_spec: QuantSpec = BACKWARD, backward_n: int = 32) -> Tensor:
        y, xq, wq = linear_forward(x, w, forward_spec, forward_n, forward_signs)
        ctx.save_for_backward(*xq, *wq, seed)
        ctx.site, ctx.width = site, x.shape[1]
        ctx.recipe = (forward_spec, forward_n, forward_signs, backward_spec, backward_n)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        *saved, seed = ctx.saved_tensors
        xq, wq = Quantized(*saved[:3]), Quantized(*saved[3:])
        gx, gw = linear_backward(grad, xq, wq, seed, ctx.site, ctx.width, *ctx.recipe)
        return gx, gw, *(None,) * 7
