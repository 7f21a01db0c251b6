"""Graph op over integer products that ``aten._int_mm`` refuses, or whose size is known only when they run.

    int_mm   A · Bᵀ of int8 codes, ``[M, K]`` and ``[N, K]`` → fp32

Few rows are padded. K is cut where int32 could overflow: each part is exact, and rounded to fp32 once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from quartet.lowering.ir.op import op

ALIGN = 16
FEWEST_ROWS = 17  # that _int_mm takes on a GPU
LONGEST = 2**17  # of K: 127² · 2^17 < 2^31


@op(fake=lambda a, b: a.new_empty(a.shape[0], b.shape[0], dtype=torch.float32), strides="exact")
def int_mm(a: Tensor, b: Tensor) -> Tensor:
    rows = a.shape[0]
    if rows < FEWEST_ROWS:
        a = F.pad(a, (0, 0, 0, 2 * ALIGN - rows))
    parts = [torch.ops.aten._int_mm.default(x, y.t()).to(torch.float32)
             for x, y in zip(a.split(LONGEST, 1), b.split(LONGEST, 1), strict=True)]
    return sum(parts[1:], parts[0])[:rows]


INT_MM = int_mm.overload
