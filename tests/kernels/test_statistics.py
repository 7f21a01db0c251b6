"""Statistics of quantisers against their definitions, element by element, and against tensors made to show each."""

import math

import pytest
import torch

from quartet.kernels import reference
from quartet.kernels.reference import statistics
from quartet.kernels.spec import QuantSpec
from quartet.recipes import recipes

GEMMS = (gemm for recipe in recipes().values() for gemm in (recipe.fprop, recipe.dgrad, recipe.wgrad) if gemm)
SPECS = sorted({str(operand.spec) for gemm in GEMMS for operand in (gemm.a, gemm.b) if operand.spec is not None})


def measured(x, spec, **given):
    values = statistics.operand_statistics(x, QuantSpec.parse(spec), **given).tolist()
    named = dict(zip(statistics.COLUMNS, values, strict=False))
    return named, {statistics.LOWEST + k: int(n) for k, n in enumerate(values[len(statistics.COLUMNS):]) if n}


@pytest.mark.parametrize("spec", SPECS)
def test_definitions(spec):
    torch.manual_seed(0)
    x = torch.randn(48, 100) * torch.exp2(torch.randint(-6, 6, (48, 1)).float())
    x[:, 3] = 0
    parsed, seed = QuantSpec.parse(spec), torch.tensor([7])
    amax = x.abs().max().reshape(1, 1) if parsed.takes_amax else None
    codes, scales, _ = reference.quantize(x, parsed, seed, 5, amax=amax)
    q = reference.dequantize(codes, scales, parsed, amax=amax)[:, :100].double()
    got, histogram = measured(x, spec, seed=seed, site=5, amax=amax)
    x = x.double()
    assert got["amax"] == x.abs().max() and got["not_finite"] == 0
    assert got["mean"] == pytest.approx(float(x.mean()), rel=1e-6)
    assert got["rms"] == pytest.approx(float(x.square().mean().sqrt()), rel=1e-6)
    assert got["zeros"] == float((q == 0).double().mean())
    assert got["underflow"] == float(((q == 0) & (x != 0)).sum().double() / (x != 0).sum())
    assert got["error"] == pytest.approx(float((q - x).square().sum() / x.square().sum()), rel=1e-5)
    assert sum(histogram.values()) == scales.numel()
    assert math.isnan(got["unfolded"]) == (not (parsed.packed and parsed.scale == "e8m0"))


@pytest.mark.parametrize("spec", ["e4m3/tensor fp32 delayed nearest", "e5m2/tensor fp32 delayed nearest"])
def test_what_a_stale_scale_clips(spec):
    x = torch.ones(8, 32)
    x[:2] = 4.0
    got, _ = measured(x, spec, amax=torch.tensor([[2.0]]))
    assert got["clipped"] == 0.25 and got["error"] == pytest.approx(2 * 32 * 4 / (2 * 32 * 16 + 6 * 32))


def test_what_vanishes_in_a_tensor_with_one_scale():
    x = torch.ones(4, 64)
    x[:, 1:] = 2.0**-40
    x[:, 2] = 0
    got, histogram = measured(x, "e4m3/tensor fp32 amax nearest")
    assert got["underflow"] == pytest.approx(62 / 63) and got["zeros"] == pytest.approx(63 / 64)
    assert histogram == {-9: 1}, "1 / 448 lies between 2^-9 and 2^-8"


def test_blocks_that_do_not_fold():
    x = torch.full((2, 96), 1.5)
    x[0, 32:64] = 0.75 * 2.0**-20
    got, histogram = measured(x, "e2m1/32 e8m0 ceil nearest")
    assert got["unfolded"] == pytest.approx(1 / 6) and got["error"] == 0
    assert histogram == {-2: 5, -23: 1}


def test_groups_fold_one_by_one():
    x = torch.full((2, 96), 1.5)
    x[:, :32] = 0.75 * 2.0**-20
    ends = torch.tensor([32, 32, 96], dtype=torch.int32)
    whole, grouped = (measured(x, "e2m1/32 e8m0 ceil nearest", ends=end)[0] for end in (None, ends))
    assert whole["unfolded"] == pytest.approx(1 / 3) and grouped["unfolded"] == 0


def test_rows_have_a_scale_in_each_group():
    x, ends = torch.full((2, 96), 448.0), torch.tensor([32, 96], dtype=torch.int32)
    x[:, :32] = 2.0**-20
    got, histogram = measured(x, "e4m3/row fp32 amax nearest", ends=ends)
    assert got["error"] == got["underflow"] == got["clipped"] == 0 and histogram == {0: 2, -29: 2}


def test_what_is_not_finite():
    x = torch.ones(2, 32)
    x[0, 0], x[1, 1] = float("nan"), float("inf")
    got, _ = measured(x, "e2m1/32 e8m0 ceil nearest")
    assert got["not_finite"] == 2 / 64 and got["amax"] == 1 and got["rms"] == 1 and math.isnan(got["error"])


def test_cosine_and_alignment():
    a, b = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 0.0]]), torch.tensor([[0.0, 2.0], [-3.0, -4.0], [1.0, 1.0]])
    mean, largest = statistics.alignment(a, b).tolist()
    assert mean == pytest.approx(0.5) and largest == pytest.approx(1.0)
    assert float(statistics.cosine(a, -a)) == pytest.approx(-1.0)


def test_nothing_in_the_tensor():
    got, _ = measured(torch.zeros(4, 32), "e2m1/16 e4m3 amax nearest", amax=torch.zeros(1, 1))
    assert got["error"] == 0 and got["underflow"] == 0 and got["zeros"] == 1
