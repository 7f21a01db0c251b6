"""Outliers apart from the rest (outlier clamping and compensation, arXiv 2501.17116): a tensor clipped to quantiles of
its elements, and what was cut off as a sparse matrix.

A sparse ``[rows, cols]`` is compressed by rows in room for a fixed number of elements: ``values`` and ``columns``
(int32), zeros after the last, and ``starts`` (int32 ``[rows + 1]``), where each row begins and ends.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

PARTS = 10000  # quantiles are counted in these


def tail_parts(quantile: float) -> int:
    """How many of 10 000 elements may lie beyond either bound."""
    return PARTS - round(quantile * PARTS)


def room(rows: Any, cols: Any, quantile: float) -> Any:
    """The most elements that can lie beyond the two bounds, about 2·(1 − quantile) of all; sizes may be symbolic."""
    return 2 * (rows * cols * tail_parts(quantile) // PARTS)


def clip_bounds(x: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """The two order statistics of all N elements with ``⌊(1 − quantile)·N⌋`` below and above: exact, no interpolation.

    0-dim tensors of the dtype of x. NaN counts as the largest.
    """
    flat = x.flatten()
    tail = flat.numel() * tail_parts(quantile) // PARTS
    if x.device.type == "cpu":
        return flat.kthvalue(tail + 1)[0], flat.kthvalue(flat.numel() - tail)[0]
    ordered = flat.sort()[0]
    return ordered[tail], ordered[-1 - tail]


def split_outliers(x: Tensor, quantile: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``x [rows, cols]`` as what is clipped to :func:`clip_bounds` plus a sparse rest.

    Returns:
        clipped ``[rows, cols]``, and the rest as values, columns and starts. The rest is rounded to the dtype of x.
    """
    rows, cols = x.shape
    size = room(rows, cols, quantile)
    starts = torch.zeros(rows + 1, dtype=torch.int32, device=x.device)
    if size == 0:
        return x.clone(memory_format=torch.contiguous_format), x.new_empty(0), starts[:0].clone(), starts
    lower, upper = clip_bounds(x, quantile)
    beyond = torch.logical_or(x < lower, x > upper)
    clipped = x.clamp(lower, upper).contiguous()
    torch.cumsum(beyond.sum(1), 0, out=starts[1:])
    places = torch.nonzero_static(beyond.flatten(), size=size, fill_value=-1)[:, 0]
    used, at = places >= 0, places.clamp(min=0)
    rest = x.flatten()[at].to(torch.float32) - clipped.flatten()[at].to(torch.float32)
    return (clipped, torch.where(used, rest, 0.0).to(x.dtype), torch.where(used, at % cols, 0).to(torch.int32), starts)


def sparse_mm(values: Tensor, columns: Tensor, starts: Tensor, dense: Tensor, cols: int, transposed: bool) -> Tensor:
    """``S · dense`` of a sparse S ``[rows, cols]``, or ``Sᵀ · dense``, in the dtype of ``dense [·, n]``.

    On a CPU with MKL a sparse product in fp32: for 2 % of the elements it takes as long as the dense product of fp32
    matrices and a sixth of that of bf16 ones. Elsewhere the dense product in the dtype of ``dense``, which tensor cores
    run faster than a sparse one of so many elements.
    """
    if dense.device.type == "cpu" and _has_sparse_products():
        product = _compressed(values, columns, starts, cols, transposed) @ dense.to(torch.float32)
        return product.to(dense.dtype).contiguous()
    matrix = to_dense(values, columns, starts, cols).to(dense.dtype)
    return (matrix.t() if transposed else matrix) @ dense


def to_dense(values: Tensor, columns: Tensor, starts: Tensor, cols: int) -> Tensor:
    """The sparse matrix with its zeros, ``[rows, cols]``."""
    rows = starts.shape[0] - 1
    matrix = values.new_zeros(rows + 1, cols)  # what room is left over lies in one row more
    matrix[_rows(starts, values.shape[0]), columns.to(torch.int64)] = values
    return matrix[:rows]


def _rows(starts: Tensor, size: int) -> Tensor:
    """The row of each element; past the last one the number of rows."""
    return torch.searchsorted(starts, torch.arange(size, dtype=torch.int32, device=starts.device), right=True) - 1


def _compressed(values: Tensor, columns: Tensor, starts: Tensor, cols: int, transposed: bool) -> Tensor:
    used = int(starts[-1])
    shape = starts.shape[0] - 1, cols
    values, columns = values[:used].to(torch.float32), columns[:used]
    if transposed:
        order = columns.argsort(stable=True)
        rows = _rows(starts, used).to(torch.int32)
        starts = torch.zeros(cols + 1, dtype=torch.int32, device="cpu")
        starts[1:] = torch.bincount(columns, minlength=cols).cumsum(0)
        values, columns, shape = values[order], rows[order], (cols, shape[0])
    return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)


@lru_cache(maxsize=1)
def _has_sparse_products() -> bool:
    """Whether PyTorch was built with MKL's; takes PyTorch's one warning that their interface may change."""
    if not torch.backends.mkl.is_available():
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.eye(1, dtype=torch.float32, device="cpu").to_sparse_csr()
    return True
