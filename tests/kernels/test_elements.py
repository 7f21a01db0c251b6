"""Element formats against ml_dtypes: E2M1, E4M3, E5M2 codes and E8M0 scales."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quartet.kernels.reference import (
    E2M1_VALUES,
    e2m1_decode,
    e2m1_encode,
    e8m0_decode,
    e8m0_reciprocal,
    fp8_encode,
)

TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
FP8 = {"e4m3": (ml_dtypes.float8_e4m3fn, 448.0), "e5m2": (ml_dtypes.float8_e5m2, 57344.0)}


def oracle_e2m1(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(x.numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8))


def neighbourhood(centre: float, ulps: int) -> np.ndarray:
    """Every fp32 within ``ulps`` bit patterns of ``centre``."""
    bits = np.float32(centre).view(np.int32) + np.arange(-ulps, ulps + 1)
    return bits[bits >= 0].astype(np.int32).view(np.float32)


@pytest.mark.parametrize("centre", (*TIES, *E2M1_VALUES, 7.0))
def test_e2m1_every_pattern_around_ties_and_values(centre):
    x = torch.from_numpy(neighbourhood(centre, 4096))
    x = torch.cat([x, -x])
    assert torch.equal(e2m1_encode(x), oracle_e2m1(x))


def test_e2m1_every_bfloat16():
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).to(torch.float32)
    x = x[torch.isfinite(x)]
    assert torch.equal(e2m1_encode(x), oracle_e2m1(x))


def test_e2m1_saturates():
    x = torch.tensor([6.0, 6.1, 1e30, math.inf, -6.1, -1e30, -math.inf])
    assert e2m1_encode(x).tolist() == [7, 7, 7, 7, 15, 15, 15]


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=64))
@settings(max_examples=100, deadline=None)
def test_e2m1_random(values):
    x = torch.tensor(values, dtype=torch.float32)
    assert torch.equal(e2m1_encode(x), oracle_e2m1(x))


def test_e2m1_decode():
    codes = torch.arange(16, dtype=torch.uint8)
    expected = torch.from_numpy(codes.numpy().view(ml_dtypes.float4_e2m1fn).astype(np.float32))
    assert torch.equal(e2m1_decode(codes).view(torch.int32), expected.view(torch.int32))  # −0 too
    assert torch.equal(e2m1_encode(expected), codes)
    assert tuple(e2m1_decode(codes[:8]).tolist()) == E2M1_VALUES


def test_e2m1_ties_golden(golden):
    g = golden("e2m1_ties")
    ours = e2m1_decode(e2m1_encode(g["in"]))
    to_even = ("qutlass_rtne", "fpquant_cast", "fouroversix", "te_cast", "torchao", "tetrajet", "microxcaling_even")
    for name in to_even:
        assert torch.equal(ours, g[name]), name
    for name in ("quartet_triton", "quartet2_triton", "microxcaling_nearest"):  # not to even: they may differ on ties
        differs = g["in"][ours != g[name]].abs()
        assert set(differs.tolist()) <= set(TIES) and len(differs) > 0, name


@pytest.mark.parametrize("index", range(7))
def test_stochastic_probability_is_the_fraction_to_half_a_512th(index):
    """All 512 draws of every value: P(up) is the fraction rounded to nine bits, to nearest even."""
    lo, hi = E2M1_VALUES[index], E2M1_VALUES[index + 1]
    fraction = torch.cat([torch.arange(0, 4096) / 4096, torch.tensor([1e-6, 1 - 1e-6])]).double()
    x = (lo + (hi - lo) * fraction).to(torch.float32)
    fraction = (x.double() - lo) / (hi - lo)
    random = torch.arange(512).unsqueeze(-1).expand(512, len(x))
    for sign in (1.0, -1.0):
        codes = e2m1_encode(sign * x.expand(512, -1), random).to(torch.int64)
        up = (codes & 7) - index
        assert set(up.unique().tolist()) <= {0, 1}
        assert bool(((codes >> 3) == (sign < 0)).all())
        p = up.double().mean(0)
        assert torch.equal(p, (fraction * 512).round() / 512)
        assert (p - fraction).abs().max() <= 1 / 1024
        assert p[0] == 0
        assert torch.equal(p[1:4096], 1 - p[1:4096].flip(0))  # symmetric
        assert bool((up.diff(dim=0) >= 0).all())  # a larger draw never rounds lower


def test_stochastic_index_is_float16():
    """512 times the mean index over all draws is the bits of float16(|x| · 2^-14), for every float16 magnitude to 6."""
    bits = torch.arange(0, 7 * 512 + 1)
    x = bits.to(torch.int16).view(torch.float16).to(torch.float32) * 2.0**14
    between = (x[1:] + x[:-1]) / 2  # ties
    x = torch.cat((x, between, between.nextafter(torch.tensor(0.0)), between.nextafter(torch.tensor(9.0))))
    total = sum((e2m1_encode(x, torch.full((len(x),), r)) & 7).to(torch.int64) for r in range(512))
    assert torch.equal(total[: len(bits)], bits)
    assert torch.equal(total, (x * 2.0**-14).to(torch.float16).view(torch.int16).to(torch.int64))


def test_stochastic_saturates_and_keeps_exact_values():
    random = torch.arange(512).unsqueeze(-1)
    exact = torch.tensor([s * v for v in E2M1_VALUES for s in (1.0, -1.0)])
    codes = e2m1_encode(exact.expand(512, -1), random.expand(512, 16))
    assert torch.equal(codes, e2m1_encode(exact).expand(512, -1))
    assert e2m1_encode(torch.full((512, 1), 100.0), random).unique().tolist() == [7]
    assert e2m1_encode(torch.full((512, 1), -math.inf), random).unique().tolist() == [15]


@pytest.mark.parametrize("element", FP8)
def test_fp8_every_half_and_random(element, gen):
    dtype, limit = FP8[element]
    half = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16).to(torch.float32)
    x = torch.cat([half[torch.isfinite(half)], torch.randn(50000, generator=gen) * limit / 2])
    grid = torch.arange(256).to(torch.uint8).numpy().view(dtype).astype(np.float32)
    grid = np.sort(grid[np.isfinite(grid)])
    middles = (grid[1:] + grid[:-1]) / 2
    near = np.concatenate([middles, np.nextafter(middles, np.float32(1e9)), np.nextafter(middles, np.float32(-1e9))])
    x = torch.cat([x, torch.from_numpy(near)])
    expected = np.clip(x.numpy(), -limit, limit).astype(dtype).view(np.uint8)
    assert torch.equal(fp8_encode(x, element).view(torch.uint8), torch.from_numpy(expected))


@pytest.mark.parametrize("element", FP8)
def test_fp8_saturates_and_keeps_nan(element):
    limit = FP8[element][1]
    x = torch.tensor([limit * 1.2, 1e30, math.inf, -limit * 1.2, -math.inf, math.nan])
    y = fp8_encode(x, element).to(torch.float32)
    assert y[:5].tolist() == [limit, limit, limit, -limit, -limit]
    assert bool(y[5].isnan())


def test_e8m0_every_byte():
    scale = torch.arange(256).to(torch.uint8)
    expected = torch.from_numpy(scale.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32))
    assert torch.equal(e8m0_decode(scale)[:255], expected[:255])
    assert bool(e8m0_decode(scale)[255].isnan()) and bool(expected[255].isnan())
    assert torch.equal((e8m0_decode(scale) * e8m0_reciprocal(scale))[:255], torch.ones(255))
    assert bool(e8m0_reciprocal(scale)[255].isnan())
