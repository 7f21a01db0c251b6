"""Semantic ops on weights and their gradients, pure functions of their arguments like the rest of the IR.

    dge(w, spec)                     [R, C] → fp32 [R, C], the slope of what quantises w
    toward(x, reference, spec)       [R, C] → [R, C] on the grid, by the neighbour nearer to the reference

``quartet.kernels.reference.estimator`` and ``toward`` say what they compute. Inductor inlines the slope, which fuses
with what it multiplies, and calls the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quartet.kernels.reference.estimator import dge_slope
from quartet.kernels.reference.q_ema import toward
from quartet.kernels.spec import QuantSpec
from quartet.lowering import ir

_ANY_STRIDES = (torch.Tag.flexible_layout,)

ir.library.define("dge(Tensor w, str spec) -> Tensor", tags=_ANY_STRIDES)
ir.library.define("toward(Tensor x, Tensor reference, str spec) -> Tensor", tags=_ANY_STRIDES)


def _dge(w: Tensor, spec: str) -> Tensor:
    return dge_slope(w, QuantSpec.parse(spec)).contiguous()


def _dge_fake(w: Tensor, spec: str) -> Tensor:
    return w.new_empty(w.shape, dtype=torch.float32)


def _toward(x: Tensor, reference: Tensor, spec: str) -> Tensor:
    return toward(x, reference, QuantSpec.parse(spec)).contiguous()


def _toward_fake(x: Tensor, reference: Tensor, spec: str) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32 if x.dtype is torch.float16 else x.dtype)


for _name, _impl, _fake in (("dge", _dge, _dge_fake), ("toward", _toward, _toward_fake)):
    ir.library.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"quartet::{_name}", _fake, lib=ir.library)

DGE = torch.ops.quartet.dge.default
TOWARD = torch.ops.quartet.toward.default


def _dge_inlined(w: Tensor, spec: str) -> Tensor:
    return dge_slope(w, QuantSpec.parse(spec), torch.ops.quartet.store)


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {DGE: _dge_inlined}
