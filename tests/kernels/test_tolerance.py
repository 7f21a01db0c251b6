"""What the reference allows of sums in another order: itself, values within the bound, and nothing beyond."""

import pytest
import torch

from quartet.kernels import reference as ref
from quartet.kernels.reference import chains, tolerance
from quartet.kernels.spec import QuantSpec

SEED, SITE = torch.tensor(77), 3
SPECS = (QuantSpec(rule="headroom", rounding="stochastic"), QuantSpec(rule="even"), QuantSpec(rule="ceil"))


def allowed(x, spec, codes, scales):
    return tolerance.allowed(x, 32, None, spec, SEED, SITE, codes, scales)


def quantized(x, spec):
    return chains.rotate_quantize(x, 32, None, spec, SEED, SITE)[:2]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("scale", [1.0, 2.0**-130, 2.0**120])
def test_the_reference_allows_itself(spec, scale):
    x = torch.randn(9, 100, generator=torch.Generator().manual_seed(1)) * scale
    x[2], x[3, 40] = 0, float("nan")
    assert allowed(x, spec, *quantized(x, spec)).all()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_another_code_is_wrong(spec):
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(2))
    codes, scales = quantized(x, spec)
    other = codes ^ 1  # every second code is another
    wrong = ~allowed(x, spec, other, scales)
    assert wrong[:, ::2].float().mean() > 0.999 and not wrong[:, 1::2].any()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_another_scale_is_wrong(spec):
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(3))
    codes, scales = quantized(x, spec)
    assert not allowed(x, spec, codes, scales + 1).any()
    assert not allowed(x, spec, codes, torch.full_like(scales, 255)).any()


@pytest.mark.parametrize(("away", "right"), [(0.5, True), (4.0, False)])
def test_a_value_near_a_threshold_may_have_either_code(away, right):
    """A block that is rotated to 4 in one place and 0.75 in another, which is a tie between codes 1 and 2."""
    spec, rotated = QuantSpec(rule="even"), torch.zeros(1, 32)
    rotated[0, 0], rotated[0, 5] = 4.0, 0.75 - away * 4.0 * tolerance.RELATIVE
    x = ref.hadamard(rotated.double().float(), 32)
    codes, scales = quantized(x, spec)
    assert codes[0, 2] >> 4 == 1
    codes[0, 2] = 2 << 4
    assert bool(allowed(x, spec, codes, scales)[0, 5]) is right


def test_what_is_broken_has_to_stay_broken():
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(4))
    x[1, 5] = float("inf")
    codes, scales = quantized(x, SPECS[0])
    assert scales[1, 0] == 255
    scales[1, 0] = 127
    wrong = ~allowed(x, SPECS[0], codes, scales)
    assert wrong[1, :32].all() and not wrong[0].any() and not wrong[1, 32:].any()
