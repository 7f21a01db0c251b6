"""Semantic ops on weights and their gradients, pure functions of their arguments like the rest of the IR.

    dge(w, spec)                     [R, C] → fp32 [R, C], the slope of what quantises w
    toward(x, reference, spec)       [R, C] → [R, C] on the grid, by the neighbour nearer to the reference

``quartet.kernels.reference.estimator`` and ``toward`` say what they compute. Inductor inlines the slope, which fuses
with what it multiplies, and calls the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quartet.kernels.reference import q_ema
from quartet.kernels.reference.estimator import dge_slope
from quartet.kernels.spec import QuantSpec
from quartet.lowering.ir import store
from quartet.lowering.ir.op import op


def _dge_inlined(w: Tensor, spec: str) -> Tensor:
    return dge_slope(w, QuantSpec.parse(spec), store)


@op(fake=lambda w, spec: w.new_empty(w.shape, dtype=torch.float32), decompose=_dge_inlined, strides="any")
def dge(w: Tensor, spec: str) -> Tensor:
    return dge_slope(w, QuantSpec.parse(spec)).contiguous()


def _toward_fake(x, reference, spec):
    return x.new_empty(x.shape, dtype=torch.float32 if x.dtype is torch.float16 else x.dtype)


@op(fake=_toward_fake, strides="any")
def toward(x: Tensor, reference: Tensor, spec: str) -> Tensor:
    return q_ema.toward(x, reference, QuantSpec.parse(spec)).contiguous()


DGE, TOWARD = dge.overload, toward.overload
