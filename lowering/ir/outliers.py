"""Semantic ops of outliers, pure functions of their arguments like the rest of the IR.

    split_outliers(x, quantile)      [R, C] → clipped [R, C], and the rest as a sparse matrix: values, columns, starts
    sparse_mm(values, columns, starts, dense, cols, transposed)     S [R, C] or its transpose, times dense

``quartet.kernels.reference.products.outliers`` says what they compute. The room of the sparse matrix follows from the
sizes, so graphs with symbolic ones hold it too. Inductor calls both as they are: order statistics and sparse products
are loops that it does not write.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quartet.kernels.reference.products import outliers
from quartet.lowering import ir

_ANY_STRIDES = (torch.Tag.flexible_layout,)

ir.library.define("split_outliers(Tensor x, float quantile) -> (Tensor, Tensor, Tensor, Tensor)", tags=_ANY_STRIDES)
ir.library.define("sparse_mm(Tensor values, Tensor columns, Tensor starts, Tensor dense, SymInt cols, bool transposed) "
                  "-> Tensor", tags=_ANY_STRIDES)


def _split_fake(x: Tensor, quantile: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, cols = x.shape
    size = outliers.room(rows, cols, quantile)
    return (x.new_empty(rows, cols), x.new_empty(size), x.new_empty(size, dtype=torch.int32),
            x.new_empty(rows + 1, dtype=torch.int32))


def _sparse_mm_fake(values: Tensor, columns: Tensor, starts: Tensor, dense: Tensor, cols: Any,
                    transposed: bool) -> Tensor:
    return dense.new_empty(cols if transposed else starts.shape[0] - 1, dense.shape[1])


for _name, _impl, _fake in (("split_outliers", outliers.split_outliers, _split_fake),
                            ("sparse_mm", outliers.sparse_mm, _sparse_mm_fake)):
    ir.library.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"quartet::{_name}", _fake, lib=ir.library)

SPLIT_OUTLIERS = torch.ops.quartet.split_outliers.default
SPARSE_MM = torch.ops.quartet.sparse_mm.default
