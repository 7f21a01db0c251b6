"""Products of groups of tokens with FP8 codes of the experts' weights, which the ops make themselves.

    expert_amax   w [E, R, C] → its largest magnitude, fp32 [1, 1]
    expert_mm     a [rows, K] FP8 codes, in groups · codes of w[e], or of its transpose where ``turned`` → [rows, N]

``w`` is a parameter as it lies and has one scale, 1 / ``multiplier``. Nothing else reads its codes or writes to them:
those that ``quartet.runtime.slots.weights`` keeps for the micro-batches of an optimizer step are multiplied without a
copy, and backward makes or finds its own, so that none are kept between the two directions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from quartet.kernels.reference.formats.elements import fp8_encode
from quartet.kernels.reference.quantize import largest_magnitude
from quartet.kernels.spec import QuantSpec
from quartet.lowering.ir import FLOAT8, ceil_to
from quartet.lowering.ir.op import op
from quartet.lowering.ir.ops.fp8 import unavailable
from quartet.runtime.slots.weights import REUSED

ALIGN = 16  # elements: what FP8 tensor cores want K and N to be a multiple of
Codes = Callable[[Tensor, Tensor, str, bool], Tensor]


@op(fake=lambda w: w.new_empty(1, 1, dtype=torch.float32), strides="any")
def expert_amax(w: Tensor) -> Tensor:
    return largest_magnitude(w)


@expert_amax.provider("triton", "cuda")
def _amax_triton(w: Tensor) -> Tensor:
    from quartet.kernels.triton.bytes import tensors

    made = REUSED.share(w, "expert_amax", lambda: tensors.largest_magnitudes([w]))
    return made.reshape(1, 1).clone()  # compiled code may overwrite results


def _mm_fake(a, a_scales, w, multiplier, scale, ends, spec, turned, dtype, fast):
    return a.new_empty(a.shape[0], ceil_to(w.shape[2 if turned else 1], ALIGN), dtype=dtype)


@op(fake=_mm_fake, supports=unavailable)
def expert_mm(a: Tensor, a_scales: Tensor, w: Tensor, multiplier: Tensor, scale: Tensor, ends: Tensor, spec: str,
              turned: bool, dtype: torch.dtype, fast: bool) -> Tensor:
    codes = codes_of(w, multiplier, spec, turned)
    return _multiply(a, a_scales, codes, _per_row(scale, codes), ends, dtype, fast)


@expert_mm.provider("triton", "cuda", unavailable)
def _mm_triton(a: Tensor, a_scales: Tensor, w: Tensor, multiplier: Tensor, scale: Tensor, ends: Tensor, spec: str,
               turned: bool, dtype: torch.dtype, fast: bool) -> Tensor:
    return multiply_kept(_codes_triton, a, a_scales, w, multiplier, scale, ends, spec, turned, dtype, fast)


def multiply_kept(make: Codes, a: Tensor, a_scales: Tensor, w: Tensor, multiplier: Tensor, scale: Tensor, ends: Tensor,
                  spec: str, turned: bool, dtype: torch.dtype, fast: bool) -> Tensor:
    """``expert_mm`` with the codes that are kept of ``w``, or that ``make`` makes of it now."""
    codes = REUSED.share(w, ("expert_mm", spec, turned), lambda: make(w, multiplier, spec, turned))
    scales = REUSED.share(w, ("expert_mm scales", spec, turned), lambda: _per_row(scale, codes))
    return _multiply(a, a_scales, codes, scales, ends, dtype, fast)


def codes_of(w: Tensor, multiplier: Tensor, spec: str, turned: bool) -> Tensor:
    """Row-major ``[E, N, K]``, zeros as far as the next multiples of 16; NaN where w is not finite."""
    x = w.mT if turned else w
    scaled = torch.where(x.isfinite(), x.to(torch.float32) * multiplier, float("nan"))
    return _padded(fp8_encode(scaled, QuantSpec.parse(spec).element))


def _codes_triton(w: Tensor, multiplier: Tensor, spec: str, turned: bool) -> Tensor:
    from quartet.kernels.triton.quantize import cast

    return _padded(cast.cast_stack(w, multiplier, FLOAT8[QuantSpec.parse(spec).element], turned=turned))


def _padded(codes: Tensor) -> Tensor:
    below, right = (-size % ALIGN for size in codes.shape[1:])
    if not below and not right:
        return codes.contiguous()
    return F.pad(codes.view(torch.uint8), (0, right, 0, below)).view(codes.dtype)


def _per_row(scale: Tensor, codes: Tensor) -> Tensor:
    return scale.expand(codes.shape[0], codes.shape[1]).contiguous()


def _multiply(a: Tensor, a_scales: Tensor, codes: Tensor, scales: Tensor, ends: Tensor, dtype: torch.dtype,
              fast: bool) -> Tensor:
    return torch.ops.aten._scaled_grouped_mm.default(a, codes.mT, a_scales, scales, ends, out_dtype=dtype,
                                                     use_fast_accum=fast)


AMAX, MM = expert_amax.overload, expert_mm.overload
