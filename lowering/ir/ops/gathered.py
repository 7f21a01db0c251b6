"""A weight of which data parallelism has gathered the codes: what a graph reads until its quantisers are found.

    gathered_weight(codes, scales, mask, amax, spec, rotation, signs, cols, dtype)   → [R, cols]

It stands for the matrix whose rotated quantised form is given, and has no value of its own: what was left out between
the matrix and its codes is on other ranks. The pass ``gathered`` puts codes in place of what quantises it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quartet.lowering.ir.op import Size, op


def _fake(codes, scales, mask, amax, spec, rotation, signs, cols, dtype):
    return codes.new_empty(codes.shape[0], cols, dtype=dtype)


@op(fake=_fake, strides="any", mergeable=True)
def gathered_weight(codes: Tensor, scales: Tensor, mask: Tensor | None, amax: Tensor | None, spec: str, rotation: int,
                    signs: list[int] | None, cols: Size, dtype: torch.dtype) -> Tensor:
    raise RuntimeError(
        f"a weight [{codes.shape[0]}, {cols}] was gathered as codes of '{spec}', and something reads it in high "
        "precision: code that backend=\"quartet\" does not compile, or a graph of which nothing is quantised. Compile "
        "its module with the policy of quartet.distributed.pack_all_gather, or leave it out there by skip=")


GATHERED = gathered_weight.overload
