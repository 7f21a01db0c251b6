"""Factors of Smooth-SwiGLU (arXiv 2409.12517): powers of two from the largest magnitudes of a linear branch."""

from __future__ import annotations

import torch
from torch import Tensor

FORMS = ("channel", "token")
_MANTISSA = 0x7FFFFF
_BIAS = 127
LIMITS = {torch.float16: 8}  # largest exponent, so that no operand leaves the range of its dtype
_LIMIT = 64


def smooth_scale(b: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """(s, 1/s) of ``b [..., channels]``, each fp32 and a power of two.

    s is 1 / max |b| rounded down to a power of two, so that the largest ``|b·s|`` lies in (½, 1]; it comes from
    exponent bits. s is 1 where that maximum is zero, infinite or NaN, and stays within 2^±64 (2^±8 in float16).

    Args:
        form: ``"channel"``: the maximum of each channel over all tokens, as in the paper; ``"token"``: the maximum of
            each token over its channels, as in the released code.
    Returns:
        ``[1, channels]`` or ``[tokens, 1]``.
    """
    limit = LIMITS.get(b.dtype, _LIMIT)
    if form == "channel":
        amax = b.abs().amax(list(range(b.dim() - 1)), keepdim=True).reshape(1, -1)
    else:
        amax = b.abs().amax(-1, keepdim=True).reshape(-1, 1)
    amax = amax.to(torch.float32)
    exponent = (amax.view(torch.int32) + _MANTISSA) >> 23  # of the next power of two
    biased = (2 * _BIAS - exponent).clamp(_BIAS - limit, _BIAS + limit)
    regular = torch.logical_and(amax > 0, amax < float("inf"))
    biased = torch.where(regular, biased, _BIAS).to(torch.int32)
    return (biased << 23).view(torch.float32), ((2 * _BIAS - biased) << 23).view(torch.float32)
