"""Semantic ops of outliers, pure functions of their arguments like the rest of the IR.

    split_outliers(x, quantile)      [R, C] → clipped [R, C], and the rest as a sparse matrix: values, columns, starts
    sparse_mm(values, columns, starts, dense, cols, transposed)     S [R, C] or its transpose, times dense

``quartet.kernels.reference.products.outliers`` says what they compute. The room of the sparse matrix follows from the
sizes, so graphs with symbolic ones hold it too. Inductor calls both as they are: order statistics and sparse products
are loops that it does not write.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quartet.kernels.reference.products import outliers
from quartet.lowering.ir.op import Size, op


def _split_fake(x, quantile):
    rows, cols = x.shape
    size = outliers.room(rows, cols, quantile)
    return (x.new_empty(rows, cols), x.new_empty(size), x.new_empty(size, dtype=torch.int32),
            x.new_empty(rows + 1, dtype=torch.int32))


@op(fake=_split_fake, strides="any")
def split_outliers(x: Tensor, quantile: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return outliers.split_outliers(x, quantile)


def _sparse_mm_fake(values, columns, starts, dense, cols, transposed):
    return dense.new_empty(cols if transposed else starts.shape[0] - 1, dense.shape[1])


@op(fake=_sparse_mm_fake, strides="any")
def sparse_mm(values: Tensor, columns: Tensor, starts: Tensor, dense: Tensor, cols: Size, transposed: bool) -> Tensor:
    return outliers.sparse_mm(values, columns, starts, dense, cols, transposed)


SPLIT_OUTLIERS, SPARSE_MM = split_outliers.overload, sparse_mm.overload
