"""What a kernel may give that adds up a Hadamard's sums in another order than the reference's butterflies.

    |sum in another order − butterflies| ≤ 2^-21 · the block's largest + 2^-124

Tensor cores were measured to stay below 3.5e-7 = 0.73 · 2^-21 of the largest; one product for the two by 1/√n and by
the scale adds at most 2^-23. By the second term what lies at the end of fp32's normal numbers may count as 0. So a
scale may be that of a largest magnitude within the bound, and a code that of any value in it, with the same random
bits: both are the reference's but for values that close to a threshold. A block with a NaN or an infinity has the
scale NaN whatever the order. The sign of a zero means nothing. From magnitudes of 2^107 on, whose sums come near the
end of fp32, NaN is as right as the scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quartet.kernels.reference.formats.elements import E8M0_NAN, e2m1_decode, e2m1_encode, e8m0_reciprocal
from quartet.kernels.reference.formats.packing import unpack_nibbles
from quartet.kernels.reference.formats.scales import e8m0_scale
from quartet.kernels.reference.hadamard import hadamard, pad_last
from quartet.kernels.reference.philox import random_bits
from quartet.kernels.spec import QuantSpec

RELATIVE, ABSOLUTE = 2.0**-21, 2.0**-124
NEAR_OVERFLOW = 2.0**107


def allowed(x: Tensor, rotation: int, signs: Tensor | None, spec: QuantSpec, seed: Tensor | None, site: int,
            codes: Tensor, scales: Tensor) -> Tensor:
    """Which elements have a code and a scale that ``chains.rotate_quantize`` may give in another order of its sums.

    Args:
        x, rotation, signs, spec, seed, site: its arguments; e2m1 with e8m0 scales by the largest magnitude.
        codes, scales: uint8 ``[R, Kp/2]`` and ``[R, Kp/block]``, the results to judge.
    Returns:
        bool ``[R, Kp]``.
    """
    values = pad_last(hadamard(x, rotation, signs), spec.multiple)
    rows, cols = values.shape
    blocks = values.reshape(rows, cols // spec.block, spec.block)
    wide = pad_last(x.to(torch.float32), cols).abs().reshape(blocks.shape).amax(-1)  # NaN stays
    magnitudes = blocks.abs()
    near = (magnitudes, (magnitudes * (1 - RELATIVE) - ABSOLUTE).clamp(min=0.0), magnitudes * (1 + RELATIVE) + ABSOLUTE)
    nan = scales == E8M0_NAN
    scale = torch.stack([scales == e8m0_scale(x, spec) for x in near]).any(0) | (nan & (wide >= NEAR_OVERFLOW))
    scale = torch.where(wide.isfinite(), scale, nan)
    bound = magnitudes.amax(-1, keepdim=True) * RELATIVE + ABSOLUTE
    random = None if seed is None or not spec.stochastic else random_bits(seed, site, rows, cols).reshape(blocks.shape)
    per_scale = e8m0_reciprocal(scales).unsqueeze(-1) * (0.75 if spec.rule == "headroom" else 1.0)
    low, high = (e2m1_decode(e2m1_encode((blocks + side) * per_scale, random)) for side in (-bound, bound))
    got = e2m1_decode(unpack_nibbles(codes)).reshape(blocks.shape)
    code = ((low <= got) & (got <= high)) | nan.unsqueeze(-1)
    return (code & scale.unsqueeze(-1)).reshape(rows, cols)
