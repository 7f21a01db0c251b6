"""FP8 with one scale a tensor or a row: the string form, the numbers against torchao and ml_dtypes, the product."""

import itertools
import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchao.float8.config import ScalingGranularity
from torchao.float8.float8_scaling_utils import hp_tensor_to_float8_dynamic
from torchao.float8.float8_training_tensor import LinearMMConfig

from quartet.kernels.reference import dequantize, fp32_scale, quantize, scaled_mm
from quartet.kernels.spec import WHOLES, QuantSpec, SpecError

AMAX_RULES = ("amax", "amax_pow2")

FP8 = {"e4m3": (torch.float8_e4m3fn, ml_dtypes.float8_e4m3fn), "e5m2": (torch.float8_e5m2, ml_dtypes.float8_e5m2)}
SPECS = [QuantSpec(e, block, "fp32", rule) for e, block, rule in itertools.product(FP8, WHOLES, AMAX_RULES)]
TENSOR, ROW = (QuantSpec("e4m3", block, "fp32", "amax") for block in ("tensor", "row"))
every_spec = pytest.mark.parametrize("spec", SPECS, ids=str)


def awkward(rows, cols, gen, dtype=torch.float32):
    """Rows of very different size, the last all zero."""
    size = torch.exp2(torch.randint(-40, 40, (rows, 1), generator=gen).float())
    x = torch.randn(rows, cols, generator=gen) * size
    x[-1] = 0
    return x.to(dtype)


def bits(codes):
    return codes.view(torch.uint8)


def torchao_cast(x, spec):
    """torchao's codes and decode scale."""
    tensorwise = spec.block == "tensor"
    got = hp_tensor_to_float8_dynamic(
        x, FP8[spec.element][0], LinearMMConfig(), axiswise_dim=None if tensorwise else -1,
        scaling_granularity=ScalingGranularity.TENSORWISE if tensorwise else ScalingGranularity.AXISWISE,
        round_scales_to_power_of_2=spec.rule == "amax_pow2")
    return got._data, got._scale


# the quantiser as a value

@every_spec
def test_string_form_reads_back(spec):
    assert QuantSpec.parse(str(spec)) == spec
    assert str(spec) == f"{spec.element}/{spec.block} fp32 {spec.rule} nearest"


def test_fields_that_a_rule_does_not_use_are_normalised():
    odd = QuantSpec("e4m3", sigma="rms", power="nearest")
    assert odd == QuantSpec("e4m3") and hash(odd) == hash(QuantSpec("e4m3"))
    assert QuantSpec.parse(str(odd)) == odd
    kept = QuantSpec(rule="quest", sigma="rms", power="nearest")
    assert (kept.sigma, kept.power) == ("rms", "nearest") and QuantSpec.parse(str(kept)) == kept


def test_properties():
    assert [QuantSpec().blocked, ROW.blocked, TENSOR.blocked] == [True, False, False]
    assert [QuantSpec().multiple, ROW.multiple, TENSOR.multiple] == [32, 1, 1]
    assert [QuantSpec().commutes_with_transpose, ROW.commutes_with_transpose, TENSOR.commutes_with_transpose] == [
        False, False, True]
    assert TENSOR.gain == 1 and not TENSOR.stochastic


@pytest.mark.parametrize("fields, message", (
    ({"block": "tensor"}, "'e8m0' with block 'tensor'.*'fp32' scales to 'row', 'tensor' or such"),
    ({"scale": "fp32", "block": "row", "rule": "ceil"}, "'ceil' gives no fp32 scale; possible: amax, amax_pow2"),
    ({"rule": "amax"}, "'amax' gives no e8m0 scale; possible: floor, ceil, headroom, quest, even"),
    ({"scale": "fp32", "block": "row", "rule": "amax", "element": "int4"}, "'int4' does not exist"),
    ({"scale": "fp32", "block": "row", "rule": "amax", "mask": True}, "'amax' never clips"),
    ({"scale": "fp32", "block": "row", "rule": "amax", "rounding": "stochastic"}, "stochastic.*e2m1 only"),
    ({"block": "column"}, "'column' is not possible; use 16, 32, 64 or 128, or 'row' or 'tensor'"),
    ({"block": 32.0}, "32.0 is not possible"),
))
def test_refusals(fields, message):
    with pytest.raises(SpecError, match=message):
        QuantSpec(**{"element": "e4m3", **fields})


# the numbers

@every_spec
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("rows, cols", ((1, 1), (1, 40), (37, 1), (33, 130)))
def test_codes_and_scales_are_those_of_torchao(spec, dtype, rows, cols, gen):
    x = torch.randn(rows, cols, generator=gen).to(dtype)
    codes, scales, mask = quantize(x, spec)
    theirs, multiplier = torchao_cast(x, spec)
    assert torch.equal(bits(codes), bits(theirs))
    assert torch.equal(scales.flatten(), multiplier.reciprocal().flatten())
    assert scales.shape == ((1, 1) if spec.block == "tensor" else (rows, 1)) and scales.dtype is torch.float32
    assert codes.dtype is FP8[spec.element][0] and codes.is_contiguous() and mask.numel() == 0


@every_spec
def test_codes_are_the_nearest_of_ml_dtypes(spec, gen):
    x = awkward(24, 64, gen)
    codes, scales, _ = quantize(x, spec)
    multiplier, _ = fp32_scale(x, spec)
    scaled = (x.numpy() * multiplier.numpy()).clip(-spec.max, spec.max)
    want = scaled.astype(FP8[spec.element][1]).view(np.uint8)
    assert np.array_equal(bits(codes).numpy(), want)
    assert torch.equal(dequantize(codes, scales, spec), codes.float() * scales)


@given(st.floats(2.0**-149, torch.finfo(torch.float32).max, width=32), st.sampled_from(SPECS))
def test_multiplier_is_the_correctly_rounded_quotient(amax, spec):
    multiplier, scale = (t.item() for t in fp32_scale(torch.tensor([[amax]]), spec))
    with np.errstate(over="ignore"):
        quotient = min(float(np.float32(spec.max) / np.float32(amax)), 2.0**126)
    if spec.rule == "amax_pow2":
        quotient = 2.0 ** (math.frexp(quotient)[1] - 1)
    assert multiplier == quotient and scale == float(np.float32(1) / np.float32(quotient))
    assert scale >= 2.0**-126 and math.isfinite(multiplier)


@every_spec
def test_largest_magnitude_becomes_the_largest_code(spec, gen):
    x = torch.randn(16, 64, generator=gen)
    codes, scales, _ = quantize(x, spec)
    top = codes.float().abs().amax(1)
    if spec.rule == "amax":
        assert top.max() == spec.max and (spec.block == "tensor" or bool((top == spec.max).all()))
    else:
        assert top.max() <= spec.max and bool(top[top.argmax()] > spec.max / 2 - spec.max / 8)
        assert torch.equal(torch.frexp(scales).mantissa, torch.full_like(scales, 0.5))


@every_spec
@pytest.mark.parametrize("size", (0.0, 1e-45, 1e-40, 1e-20, 1e20, 3e38))
def test_sizes_at_the_ends_of_the_range(spec, size):
    x = torch.tensor([[size, -size, size / 2, 0.0]])
    codes, scales, _ = quantize(x, spec)
    assert torch.isfinite(codes.float()).all() and torch.isfinite(scales).all() and (scales > 0).all()
    if size == 0:
        assert scales.item() == 1 and not codes.float().any()
    if size > 1e-35:
        torch.testing.assert_close(dequantize(codes, scales, spec), x, rtol=2**-3, atol=0)


@every_spec
@pytest.mark.parametrize("bad", (float("nan"), float("inf"), -float("inf")))
def test_what_is_not_finite_stays_visible(spec, bad, gen):
    x, w = torch.randn(5, 32, generator=gen), torch.randn(4, 32, generator=gen)
    x[2, 7] = bad
    codes, scales, _ = quantize(x, spec)
    lost = torch.ones(5, dtype=torch.bool) if spec.block == "tensor" else torch.arange(5) == 2
    assert torch.equal(codes.float().isnan(), lost[:, None].expand(5, 32))
    assert torch.equal(dequantize(codes, scales, spec).isnan().all(1), lost)
    y = scaled_mm(codes, scales, *quantize(w, TENSOR)[:2], spec, TENSOR)
    assert torch.equal(y.isnan(), lost[:, None].expand(5, 4))


@pytest.mark.parametrize("rule", AMAX_RULES)
def test_a_tensor_scale_commutes_with_the_transpose_and_a_row_scale_does_not(rule, gen):
    x = awkward(9, 20, gen)
    tensor, row = (QuantSpec("e4m3", block, "fp32", rule) for block in ("tensor", "row"))
    (codes, scales, _), (t_codes, t_scales, _) = quantize(x, tensor), quantize(x.t(), tensor)
    assert torch.equal(bits(codes.t().contiguous()), bits(t_codes)) and torch.equal(scales, t_scales)
    assert t_codes.is_contiguous()
    by_row, by_column = quantize(x, row)[0], quantize(x.t(), row)[0]
    assert not torch.equal(bits(by_row.t().contiguous()), bits(by_column))


# the product

@pytest.mark.parametrize("a_spec, b_spec", [*((s, s) for s in SPECS if s.element == "e4m3"),
                                            (SPECS[4], TENSOR), (ROW, TENSOR), (TENSOR, ROW),
                                            (ROW, QuantSpec("e2m1")), (QuantSpec(rule="headroom"), TENSOR)])
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_product_of_two_quantised_tensors(a_spec, b_spec, dtype, gen):
    x, w = torch.randn(17, 64, generator=gen), torch.randn(9, 64, generator=gen)
    a, b = quantize(x, a_spec, torch.tensor(3)), quantize(w, b_spec, torch.tensor(3))
    got = scaled_mm(*a[:2], *b[:2], a_spec, b_spec, dtype)
    exact = dequantize(*a[:2], a_spec).double() @ dequantize(*b[:2], b_spec).double().t()
    assert got.dtype is dtype
    torch.testing.assert_close(got.double(), exact, rtol=2**-8 if dtype is torch.bfloat16 else 1e-5, atol=1e-5)
    noise = (got.double() - x.double() @ w.double().t()).square().mean() / 64
    assert 0 < noise < (3e-3 if a_spec.element == b_spec.element == "e4m3" else 2e-1)


@pytest.mark.parametrize("rule, least", (("amax", 30), ("amax_pow2", 29)))
def test_signal_to_noise_of_gaussian_data(rule, least, gen):
    x = torch.randn(256, 256, generator=gen)
    for block in WHOLES:
        spec = QuantSpec("e4m3", block, "fp32", rule)
        error = dequantize(*quantize(x, spec)[:2], spec) - x
        assert least < 20 * math.log10(x.norm() / error.norm()) < 34
