"""Sizes and dtypes of what quantisers write."""

from __future__ import annotations

from typing import Any

import torch

from quartet.kernels.spec import QuantSpec

FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_SCALES = {"e8m0": torch.uint8, "e4m3": torch.float8_e4m3fn, "fp32": torch.float32}


def ceil_to(size, multiple: int):
    """``size`` (int or SymInt) rounded up, without a guard."""
    return (size + multiple - 1) // multiple * multiple


def code_layout(spec: QuantSpec, padded: Any) -> tuple[torch.dtype, Any]:
    """dtype and last-axis length of the codes of ``padded`` elements."""
    return (spec.format.storage, padded // 2 if spec.packed else padded)


def scale_layout(spec: QuantSpec, rows: Any, padded: Any) -> tuple[torch.dtype, tuple[Any, Any]]:
    """dtype and shape of the scales of ``[rows, padded]`` elements."""
    dtype = _SCALES[spec.scale]
    if spec.blocked:
        return dtype, (ceil_to(rows, spec.block) // spec.block if spec.tile else rows, padded // spec.block)
    return dtype, (1 if spec.block == "tensor" else rows, 1)
