"""The block Hadamard transform: matrix, order of the sum, inverse, and what signs do to codes."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from quartet.kernels.reference import dequantize, hadamard, pad_last, quantize, unpack_nibbles
from quartet.kernels.reference.hadamard import FLAT_SIGNS
from quartet.kernels.spec import QuantSpec

SIZES = (16, 32, 64, 128)


def random_pm1(n, gen):
    return torch.randint(0, 2, (n,), generator=gen).to(torch.float32) * 2 - 1


@pytest.mark.parametrize("n", SIZES)
def test_matrix_golden(golden, n):
    assert torch.equal(hadamard(torch.eye(n), n), golden("hadamard")[f"H{n}"])


def test_signed_matrix_golden(golden):
    g = golden("hadamard")
    signed = hadamard(torch.eye(16), 16, g["te_wgrad_signs"])
    assert torch.equal(signed, g["te_rht16"]) and torch.equal(signed, g["f46_rht16"])


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("signed", (False, True))
def test_against_the_matrix_in_float64(n, signed, gen, sylvester):
    x = torch.randn(7, 3 * n, generator=gen)
    s = random_pm1(n, gen) if signed else None
    h = sylvester(n) / math.sqrt(n)
    operand = x.double().reshape(7, 3, n) * (s.double() if signed else 1)
    assert torch.allclose(hadamard(x, n, s).double(), (operand @ h).reshape(7, -1), atol=3e-6, rtol=0)
    back = (x.double().reshape(7, 3, n) @ h) * (s.double() if signed else 1)
    assert torch.allclose(hadamard(x, n, s, inverse=True).double(), back.reshape(7, -1), atol=3e-6, rtol=0)


@pytest.mark.parametrize("n", SIZES)
def test_order_of_the_sum_is_pinned(n, gen):
    """Scalar butterfly in NumPy fp32, strides n/2 … 1, one multiplication at the end: bit for bit."""
    x = torch.randn(2, n, generator=gen) * torch.tensor(10.0) ** torch.randint(-4, 5, (2, n), generator=gen)
    y = x.numpy().copy()
    stride = n // 2
    while stride:
        for i in range(n):
            if not i & stride:
                a, b = y[:, i].copy(), y[:, i + stride].copy()
                y[:, i], y[:, i + stride] = a + b, a - b
        stride //= 2
    assert torch.equal(hadamard(x, n), torch.from_numpy(y * np.float32(1 / math.sqrt(n))))


@pytest.mark.parametrize("n", (16, 64))
def test_own_inverse_exactly_when_the_factor_is_a_power_of_two(n, gen):
    x = torch.randint(-100, 101, (4, 2 * n), generator=gen).to(torch.float32)
    s = random_pm1(n, gen)
    assert torch.equal(hadamard(hadamard(x, n), n), x)
    assert torch.equal(hadamard(hadamard(x, n, s), n, s, inverse=True), x)


@pytest.mark.parametrize("n", (32, 128))
def test_own_inverse(n, gen):
    x = torch.randn(4, 2 * n, generator=gen)
    s = random_pm1(n, gen)
    assert torch.allclose(hadamard(hadamard(x, n), n), x, atol=2e-6)
    assert torch.allclose(hadamard(hadamard(x, n, s), n, s, inverse=True), x, atol=2e-6)
    assert not torch.allclose(hadamard(hadamard(x, n, s), n, s), x, atol=0.1)  # signs belong after the inverse


def test_rotations_cancel_in_a_product(gen):
    a, b = torch.randn(8, 100, generator=gen), torch.randn(6, 100, generator=gen)
    s = random_pm1(32, gen)
    rotated = hadamard(a, 32, s).double() @ hadamard(b, 32, s).double().t()
    assert torch.allclose(rotated, a.double() @ b.double().t(), atol=2e-5)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_dtypes_and_padding(dtype, gen):
    x = torch.randn(3, 50, generator=gen).to(dtype)
    y = hadamard(x, 32)
    assert y.dtype == torch.float32 and y.shape == (3, 64)
    assert torch.equal(y, hadamard(torch.nn.functional.pad(x.float(), (0, 14)), 32))
    assert torch.equal(hadamard(x, 32, dtype=dtype), y.to(dtype))
    assert hadamard(x[:0], 32).shape == (0, 64)
    assert pad_last(x, 50) is x


def test_size_that_does_not_exist():
    with pytest.raises(ValueError, match="24.*16, 32, 64, 128"):
        hadamard(torch.zeros(1, 24), 24)


def test_signs_before_change_the_codes_and_signs_after_would_not(gen):
    """Signs after the transform pass through any symmetric quantiser: only the sign bit of each code moves."""
    spec = QuantSpec(rule="headroom")
    x, s = torch.randn(16, 64, generator=gen), random_pm1(32, gen)

    def magnitudes(y):
        codes, scales, _ = quantize(y, spec)
        return unpack_nibbles(codes) & 7, scales

    plain, plain_scales = magnitudes(hadamard(x, 32))
    after, after_scales = magnitudes(hadamard(x, 32) * s.repeat(2))
    before, _ = magnitudes(hadamard(x, 32, s))
    assert torch.equal(after, plain) and torch.equal(after_scales, plain_scales)
    assert (before != plain).float().mean() > 0.5


def test_signs_golden(golden):
    g, spec = golden("mxfp4_sr_bwd"), QuantSpec(rule="headroom")

    def value(y):
        codes, scales, _ = quantize(y, spec)
        return dequantize(codes, scales, spec)

    assert torch.equal(value(hadamard(g["v"], 32, g["signs"])), g["rtn_signs_before"])
    assert torch.equal(value(hadamard(g["v"], 32) * g["signs"]), g["rtn_signs_after"])
    assert torch.equal(g["rtn_signs_after"] * g["signs"], g["rtn"])  # the released bug: a no-op


def test_flat_signs_leave_no_coefficient_of_a_constant_above_the_least_possible():
    """8/√32: no 32 signs are further than 12 changes from every row of ±H32 (the covering radius of RM(1, 5))."""
    coefficients = hadamard(torch.tensor([FLAT_SIGNS], dtype=torch.float32), 32) * 32**0.5
    assert Counter(coefficients.abs().round().flatten().tolist()) == {8: 12, 4: 16, 0: 4}
