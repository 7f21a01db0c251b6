"""Statistics of quantisers against quantisers and statistics in numpy, from the formulas of ``docs/recipes.md``."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch

from quartet.kernels.reference import statistics
from quartet.kernels.spec import QuantSpec

COLS = 256
E2M1, E4M3, E5M2 = ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
MOST = {E2M1: 6.0, E4M3: 448.0, E5M2: 57344.0, np.int8: 127.0}


def tensor(rows=48):
    """Gaussian rows of many sizes, a few outliers, zeros, and values that vanish beside the others."""
    random = np.random.default_rng(3)
    x = random.standard_normal((rows, COLS)) * 2.0 ** random.integers(-4, 5, (rows, 1))
    x[random.random(x.shape) < 0.01] *= 40
    x[:, 3], x[:, 7], x[5, 32:64] = 0, 1e-12, random.standard_normal(32) * 2.0**-14
    return x.astype(np.float32)


def rounded(x, element):
    """To the nearest that the element format has, at most its largest."""
    most = MOST[element]
    x = np.clip(x, -most, most)
    return np.rint(x) if element is np.int8 else x.astype(np.float32).astype(element).astype(np.float64)


def largest(x, rows, cols):
    """Of each block of so many rows and columns, at each of its elements."""
    blocks = np.abs(x.astype(np.float64)).reshape(x.shape[0] // rows, rows, x.shape[1] // cols, cols).max((1, 3))
    return blocks.repeat(rows, 0).repeat(cols, 1)


def even(a):
    """2^(⌊log2 a'⌋ − 2), a' = a to the nearest of 2^k and 1.5 · 2^k."""
    fraction, exponent = np.frexp(a)  # a = fraction · 2^exponent, 0.5 ≤ fraction < 1
    return 2.0 ** (exponent - 1 - 2 + (fraction >= 0.875))


def down_to_power(x):
    return 2.0 ** (np.frexp(x)[1] - 1)


def single(x):
    return np.asarray(x, dtype=np.float32).astype(np.float64)


def by_amax(rows, cols, element, power=False):
    def scales(x, amax):
        encode = single(MOST[element] / largest(x, rows or x.shape[0], cols))
        return 1 / single(down_to_power(encode) if power else encode)
    return scales, element, (rows, cols)


def nvfp4(rows):
    def scales(x, amax):
        whole = np.abs(x).max() / (448.0 * 6.0)
        return rounded(largest(x, rows, 16) / (6 * whole), E4M3) * whole
    return scales, E2M1, (rows, 16)


AMAX = 3.0  # of an earlier step, below what the tensor has now
QUANTISERS = {
    "e2m1/32 e8m0 even nearest": (lambda x, amax: even(largest(x, 1, 32)), E2M1, (1, 32)),
    "e4m3/32 e8m0 ceil nearest": (lambda x, amax: 2.0 ** np.ceil(np.log2(largest(x, 1, 32) / 448)), E4M3, (1, 32)),
    "e2m1/16 e4m3 amax nearest": nvfp4(1),
    "e2m1/16x16 e4m3 amax nearest": nvfp4(16),
    "e4m3/tensor fp32 amax nearest": by_amax(0, COLS, E4M3),
    "e4m3/row fp32 amax_pow2 nearest": by_amax(1, COLS, E4M3, power=True),
    "e4m3/128 fp32 amax_pow2 nearest": by_amax(1, 128, E4M3, power=True),
    "e4m3/16x16 fp32 amax_pow2 nearest": by_amax(16, 16, E4M3, power=True),
    "int8/tensor fp32 amax nearest": by_amax(0, COLS, np.int8),
    "int8/row fp32 amax nearest": by_amax(1, COLS, np.int8),
    "e4m3/tensor fp32 delayed nearest": (lambda x, amax: np.full(x.shape, AMAX / 448), E4M3, (0, COLS)),
    "e5m2/tensor fp32 delayed nearest": (lambda x, amax: np.full(x.shape, AMAX / 57344), E5M2, (0, COLS)),
}


@pytest.mark.parametrize("text", QUANTISERS)
def test_every_column(text):
    x, spec = tensor(), QuantSpec.parse(text)
    scales, element, (rows, cols) = QUANTISERS[text]
    given = AMAX if spec.rule == "delayed" else np.abs(x).max() if spec.takes_amax else None
    scale, wide = scales(x, given), x.astype(np.float64)
    q = rounded(wide / scale, element) * scale
    amax = None if given is None else torch.tensor([[float(given)]])
    values = statistics.operand_statistics(torch.from_numpy(x), spec, amax=amax).tolist()
    got = dict(zip(statistics.COLUMNS, values, strict=False))
    assert got["amax"] == np.abs(wide).max() and got["not_finite"] == 0
    assert got["mean"] == pytest.approx(wide.mean(), rel=1e-6)
    assert got["rms"] == pytest.approx(math.sqrt((wide**2).mean()), rel=1e-6)
    assert got["zeros"] == (q == 0).mean()
    assert got["underflow"] == ((q == 0) & (wide != 0)).sum() / (wide != 0).sum() and got["underflow"] > 0
    beyond = np.abs(wide) > scale * MOST[element] * (1 + 1e-6)
    assert got["clipped"] == beyond.mean()
    assert (got["clipped"] > 0) == (spec.scale == "e4m3" or spec.rule in ("even", "delayed"))
    assert got["error"] == pytest.approx(((q - wide)**2).sum() / (wide**2).sum(), rel=1e-4)
    exponents = np.frexp(scale[::rows or len(x), ::cols])[1] - 1
    bins = {statistics.LOWEST + k: int(n) for k, n in enumerate(values[len(statistics.COLUMNS):]) if n}
    assert bins == dict(zip(*map(np.ndarray.tolist, np.unique(exponents, return_counts=True)), strict=True))
    if text == "e2m1/32 e8m0 even nearest":
        assert got["unfolded"] == unfolded(wide, scale, q) > 0
    else:
        assert math.isnan(got["unfolded"])


def unfolded(x, scale, q):
    """Share of blocks that E4M3 under one power of two a row does not hold: the one that puts the largest block's step
    at 2^6, where E2M1's largest, 6 · 2^6, still fits."""
    step, values = scale[:, ::32], q.reshape(len(x), -1, 32)
    row = np.where((values == 0).all(-1), 0, step).max(1, keepdims=True) / 2**6
    held = (q / row).astype(np.float32).astype(E4M3).astype(np.float64) * row
    return (held.reshape(values.shape) != values).any(-1).mean()
