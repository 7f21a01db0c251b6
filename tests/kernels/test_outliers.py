"""Outliers: bounds that are order statistics, a split that loses nothing, and the products of the sparse part."""

import math

import pytest
import torch

from quartet.kernels.reference.products import outliers
from quartet.lowering.ir.ops import outliers as outlier_ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantile", [0.99, 0.9, 0.5001, 0.9999])
@pytest.mark.parametrize("shape", [(37, 53), (1, 100), (200, 1), (3, 5)])
def test_bounds_are_order_statistics(dtype, quantile, shape):
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    low, high = outliers.clip_bounds(x, quantile)
    ordered = sorted(x.flatten().tolist())
    tail = int(round((1 - quantile) * 10000)) * len(ordered) // 10000
    assert low.item() == ordered[tail] and high.item() == ordered[len(ordered) - 1 - tail]
    assert low.dtype is dtype and (x < low).sum() <= tail and (x > high).sum() <= tail


def test_bounds_without_ties_leave_out_the_share():
    x = torch.randperm(10000).reshape(100, 100).float()
    low, high = outliers.clip_bounds(x, 0.99)
    assert (low.item(), high.item()) == (100, 9899)
    assert (x < low).sum() == (x > high).sum() == 100


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(37, 53), (1, 300), (300, 1), (128, 256)])
def test_the_split_loses_nothing(dtype, shape):
    torch.manual_seed(1)
    x = (torch.randn(shape) ** 3).to(dtype)
    clipped, values, columns, starts = outliers.split_outliers(x, 0.99)
    low, high = outliers.clip_bounds(x, 0.99)
    assert torch.equal(clipped, x.clamp(low, high)) and clipped.is_contiguous()
    assert len(values) == len(columns) == outliers.room(*shape, 0.99)
    used = int(starts[-1])
    assert used == ((x < low) | (x > high)).sum() > 0
    assert (values[used:] == 0).all() and (columns[used:] == 0).all()
    rest = outliers.to_dense(values, columns, starts, shape[1])
    assert rest.shape == shape
    assert torch.equal(rest.float(), (x.float() - clipped.float()).to(dtype).float())
    torch.testing.assert_close(clipped.float() + rest.float(), x.float(), rtol=torch.finfo(dtype).eps, atol=0)


def test_ties_beyond_the_bound_are_not_outliers():
    x = torch.ones(10, 100)
    x[0, :50] = 5.0
    clipped, _, _, starts = outliers.split_outliers(x, 0.99)
    assert torch.equal(clipped, x) and starts[-1] == 0


@pytest.mark.parametrize("shape", [(3, 5), (0, 16)])
def test_too_few_elements_for_an_outlier(shape):
    x = torch.randn(shape)
    clipped, values, columns, starts = outliers.split_outliers(x, 0.99)
    assert torch.equal(clipped, x) and values.numel() == columns.numel() == 0
    assert starts.tolist() == [0] * (shape[0] + 1)
    product = outliers.sparse_mm(values, columns, starts, torch.randn(shape[1], 4), shape[1], False)
    assert torch.equal(product, torch.zeros(shape[0], 4))


def test_what_is_not_finite_stays_visible():
    x = torch.randn(20, 20)
    x[2, 3], x[5, 6] = math.nan, math.inf
    clipped, values, columns, starts = outliers.split_outliers(x, 0.99)
    assert clipped[2, 3].isnan()
    out = clipped @ torch.ones(20, 2) + outliers.sparse_mm(values, columns, starts, torch.ones(20, 2), 20, False)
    assert not out[2].isfinite().any() and not out[5].isfinite().any() and out[7].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sparse", [True, False])
def test_products(monkeypatch, dtype, transposed, sparse):
    if sparse:
        assert torch.backends.mkl.is_available() == outliers._has_sparse_products()
    monkeypatch.setattr(outliers, "_has_sparse_products", lambda: sparse and torch.backends.mkl.is_available())
    torch.manual_seed(2)
    x = torch.randn(61, 45).to(dtype)
    _, *rest = outliers.split_outliers(x, 0.98)
    matrix = outliers.to_dense(*rest, 45).double()
    matrix = matrix.t() if transposed else matrix
    dense = torch.randn(7, matrix.shape[1]).to(dtype).t()
    got = outliers.sparse_mm(*rest, dense, 45, transposed)
    assert got.dtype is dtype and got.is_contiguous()
    torch.testing.assert_close(got.double(), matrix @ dense.double(), rtol=0.01, atol=0.03)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_ops_and_their_fakes(dtype, transposed):
    x = torch.randn(40, 60, dtype=dtype)
    x = x.t() if transposed else x
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(outlier_ops.SPLIT_OUTLIERS, (x, 0.99), test_utils=checks)
    _, *rest = outlier_ops.SPLIT_OUTLIERS(x, 0.99)
    rows, cols = x.shape
    for flip, size in ((False, cols), (True, rows)):
        dense = torch.randn(size, 8, dtype=dtype)
        torch.library.opcheck(outlier_ops.SPARSE_MM, (*rest, dense, cols, flip), test_utils=checks)
