"""Block Hadamard transforms: normalised Sylvester matrices along the last axis."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SIZES = (16, 32, 64, 128)
# under which H32 spreads a constant c: twelve coefficients of ±1.41 c, sixteen of ±0.71 c and four of 0, where without
# signs one has all of it, 5.66 c; no signs leave less than 1.41 c in the largest
FLAT_SIGNS = tuple(1 if sign == "+" else -1 for sign in "-++-++++++-++-+-++---+---+++-+--")


def pad_last(x: Tensor, multiple: int) -> Tensor:
    """Zero-pad the last axis of a 2-D tensor up to a multiple."""
    extra = -x.shape[-1] % multiple
    return x if isinstance(extra, int) and extra == 0 else torch.nn.functional.pad(x, (0, extra))


def hadamard(x: Tensor, n: int, signs: Tensor | None = None, inverse: bool = False,
             dtype: torch.dtype = torch.float32) -> Tensor:
    """``(x ⊙ s) · H_n`` in consecutive blocks of ``n``; ``inverse``: ``(x · H_n) ⊙ s``.

    The sum is a butterfly in fp32 with strides n/2, …, 2, 1, then one multiplication by fp32 1/√n:
    that order is part of the definition.

    Args:
        x: ``[rows, cols]``, any float dtype; ``cols`` is zero-padded to a multiple of ``n``.
        n: 16, 32, 64 or 128.
        signs: ``[n]`` of ±1, shared by every block, or None.
    Returns:
        ``[rows, ceil(cols/n)·n]`` of ``dtype``.
    """
    if n not in SIZES:
        raise ValueError(f"Hadamard size {n} is not possible; use one of {SIZES}")
    x = pad_last(x.to(torch.float32), n)
    rows, cols = x.shape
    y = x.reshape(rows, cols // n, n)
    if signs is not None and not inverse:
        y = y * signs
    stride = n // 2
    while stride >= 1:
        pair = y.reshape(rows, cols // n, n // (2 * stride), 2, stride)
        a, b = pair[..., 0, :], pair[..., 1, :]
        y = torch.stack((a + b, a - b), dim=-2).reshape(rows, cols // n, n)
        stride //= 2
    y = y * (1.0 / math.sqrt(n))
    if signs is not None and inverse:
        y = y * signs
    return y.reshape(rows, cols).to(dtype)
