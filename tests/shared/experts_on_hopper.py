"""Uneven groups of tokens, and the grouped product of FP8 tensor cores written down for a CPU."""

import torch

from quartet import Policy
from quartet.lowering.ir.ops import fp8 as fp8_ops

COUNTS = (5, 0, 17, 40, 2)
ENDS = torch.tensor(COUNTS).cumsum(0).to(torch.int32)
TOKENS = 70  # six of them in no group


def on(op, recipe):
    return Policy(None).on(op, recipe)


def scaled_grouped_mm(a, b, scale_a, scale_b, offs=None, bias=None, scale_result=None, out_dtype=None, fast=False):
    """What ``aten._scaled_grouped_mm`` computes; what it leaves undefined is NaN."""
    a, b = a.float(), b.float()
    if offs is None:
        assert len(a) <= fp8_ops.MOST_GROUPS or not fast
        return ((a @ b) * scale_a.unsqueeze(2) * scale_b.unsqueeze(1)).to(out_dtype)
    bounds = list(zip([0, *offs.tolist()], offs.tolist(), strict=False))
    if b.dim() == 3:
        out = torch.full((a.shape[0], b.shape[2]), float("nan"))
        for group, (start, end) in enumerate(bounds):
            out[start:end] = (a[start:end] @ b[group]) * scale_a[start:end, None] * scale_b[group]
        return out.to(out_dtype)
    assert all((end - start) % 16 == 0 for start, end in bounds)
    left, right = scale_a.reshape(len(bounds), -1, 1), scale_b.reshape(len(bounds), 1, -1)
    return torch.stack([(a[:, start:end] @ b[start:end]) * left[group] * right[group]
                        for group, (start, end) in enumerate(bounds)]).to(out_dtype)
