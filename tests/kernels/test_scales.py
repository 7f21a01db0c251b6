"""E8M0 scale rules against exact arithmetic and against torchao's MX encoders."""

import math
from fractions import Fraction

import pytest
import torch

from quartet.kernels.reference import e8m0_scale, quantize, tree_sum
from quartet.kernels.spec import ELEMENTS, QuantSpec

FLT_MAX = torch.finfo(torch.float32).max
CLIP = 2.92247856 / 6
QUEST = QuantSpec(rule="quest", sigma="centred")
MX = [element.name for element in ELEMENTS.values() if element.emax is not None]


def floor_log2(x: Fraction) -> int:
    e = x.numerator.bit_length() - x.denominator.bit_length()
    return e if Fraction(2) ** e <= x else e - 1


def exact_byte(amax: float, element: str, rule: str) -> int:
    """The rule in rational arithmetic."""
    a = Fraction(amax)
    if rule == "ceil":
        ratio = a / Fraction(ELEMENTS[element].max)
        e = floor_log2(ratio)
        e += Fraction(2) ** e < ratio
    elif rule == "even":
        e = floor_log2(a * Fraction(8, 7)) - 2  # from 7/8 of a power of two on the next one
    else:
        e = floor_log2(a) - ELEMENTS[element].emax
    return min(max(e + 127, 0), 254)


def blocks_with_amax(amax: torch.Tensor, n: int = 32) -> torch.Tensor:
    x = amax.unsqueeze(-1) * torch.linspace(-0.9, 0.9, n)
    x[:, 5] = -amax
    return x


def around_powers() -> torch.Tensor:
    """fp32 within 2 ulp of every power of two and of max · 2^k for the three formats, subnormals included."""
    centres = [m * 2.0**k for m in (1.0, 1.5, 1.75) for k in range(-149, 128)]
    bits = torch.tensor(centres, dtype=torch.float32).view(torch.int32).unsqueeze(-1) + torch.arange(-2, 3)
    bits = bits[(bits > 0) & (bits < 0x7F800000)]
    return bits.to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("element", MX)
@pytest.mark.parametrize("rule", ("floor", "ceil", "headroom", "even"))
def test_rules_in_exact_arithmetic(element, rule):
    if rule in ("headroom", "even") and element != "e2m1":
        with pytest.raises(ValueError, match="e2m1 only"):
            QuantSpec(element, rule=rule)
        return
    amax = around_powers()
    bytes_ = e8m0_scale(blocks_with_amax(amax), QuantSpec(element, rule=rule))
    assert bytes_.tolist() == [exact_byte(a, element, rule) for a in amax.tolist()]


def torchao_to_mx(x: torch.Tensor, element: str, rule: str):
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor", reason="torchao is the oracle")
    dtype = {"e2m1": torch.float4_e2m1fn_x2, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[element]
    modes = {"floor": mx.ScaleCalculationMode.FLOOR, "ceil": mx.ScaleCalculationMode.RCEIL,
             "even": mx.ScaleCalculationMode.EVEN}
    scales, codes = mx.to_mx(x, dtype, 32, modes[rule])
    return scales.view(torch.uint8), codes.view(torch.uint8)


@pytest.mark.parametrize("element", MX)
@pytest.mark.parametrize("rule", ("floor", "ceil", "even"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_torchao_bit_for_bit(element, rule, dtype, gen):
    if rule == "even" and element != "e2m1":
        return
    magnitude = torch.tensor(2.0) ** (torch.rand(512, 1, generator=gen) * 200 - 90)
    x = (torch.randn(512, 256, generator=gen) * magnitude).to(dtype)
    scales, codes = torchao_to_mx(x, element, rule)
    ours, ours_scales, _ = quantize(x, QuantSpec(element, rule=rule))
    assert torch.equal(ours_scales, scales)
    assert torch.equal(ours.view(torch.uint8), codes)


@pytest.mark.parametrize("element, rule", [*((element, "floor") for element in MX), ("e2m1", "even")])
def test_torchao_on_the_edges(element, rule):
    """Every amax next to a power of two. Below 2^-126 torchao divides by 2^-126 instead of the scale it stores."""
    amax = around_powers()
    x = blocks_with_amax(amax)
    scales, codes = torchao_to_mx(x, element, rule)
    ours, ours_scales, _ = quantize(x, QuantSpec(element, rule=rule))
    assert torch.equal(ours_scales, scales)
    normal = ours_scales[:, 0] > 0
    assert torch.equal(ours.view(torch.uint8)[normal], codes[normal]) and normal.float().mean() > 0.85


@pytest.mark.parametrize("element", MX)
def test_torchao_rceil_on_the_edges(element):
    """torchao's fp32 log2 may miss that amax/max is an ulp above a power of two; there, and only there, we differ."""
    amax = around_powers()
    amax = amax[(amax > 2.0**-100) & (amax < 2.0**120)]
    scales, _ = torchao_to_mx(blocks_with_amax(amax), element, "ceil")
    ours = e8m0_scale(blocks_with_amax(amax), QuantSpec(element, rule="ceil"))
    differs = ours != scales[:, 0]
    ratio = amax.double() / ELEMENTS[element].max
    above = torch.frexp(ratio).mantissa * 2 - 1
    assert bool(((above > 0) & (above < 2.0**-21))[differs].all())
    assert bool((ours[differs] == scales[:, 0][differs] + 1).all())


@pytest.mark.parametrize("element", MX)
@pytest.mark.parametrize("rule", ("floor", "ceil", "headroom", "quest", "even"))
def test_zero_nan_and_infinite_blocks(element, rule):
    if rule in ("headroom", "quest", "even") and element != "e2m1":
        return
    x = torch.randn(6, 32)
    x[0] = 0
    x[1] = -0.0
    x[2, 3], x[3, 0], x[4, 31] = math.nan, math.inf, -math.inf
    bytes_ = e8m0_scale(x, QuantSpec(element, rule=rule)).tolist()
    assert bytes_[:5] == [127, 127, 255, 255, 255] and bytes_[5] != 255


def test_tree_sum_order(gen):
    x = torch.randn(50, 128, generator=gen) * 10.0 ** torch.randint(-6, 7, (50, 128), generator=gen)
    y = x.numpy().copy()
    while y.shape[1] > 1:
        y = y[:, : y.shape[1] // 2] + y[:, y.shape[1] // 2 :]
    assert torch.equal(tree_sum(x), torch.from_numpy(y[:, 0]))
    assert torch.equal(tree_sum(torch.tensor([[1e8, 1.0, -1e8, 1.0]])), torch.tensor([2.0]))  # (a+c)+(b+d)


@pytest.mark.parametrize("sigma", ("centred", "guarded", "rms"))
@pytest.mark.parametrize("power", ("floor", "nearest"))
@pytest.mark.parametrize("block", (16, 32, 128))
def test_quest_against_float64(sigma, power, block, gen):
    """log2 in float64; blocks within 1e-5 of a step of the scale, about 1 in 50000, may fall either way."""
    spread = torch.tensor(2.0) ** (torch.rand(4000, 1, generator=gen) * 120 - 20)
    x = (torch.randn(4000, block, generator=gen) + torch.randn(4000, 1, generator=gen)) * spread
    d = x.double()
    square = (d * d).mean(-1)
    variance = {
        "rms": square,
        "centred": square - d.mean(-1) ** 2,
        "guarded": torch.maximum(square - d.mean(-1) ** 2, square / 16),
    }[sigma]
    log = torch.log2(variance.sqrt() * CLIP + 1e-8)
    exponent = (log + 0.5 if power == "nearest" else log).floor()
    bytes_ = e8m0_scale(x, QuantSpec(block=block, rule="quest", sigma=sigma, power=power))
    edge = (log + (0.5 if power == "nearest" else 0)).frac().abs()
    edge = torch.minimum(edge, 1 - edge) < 1e-5
    assert edge.sum() <= 4
    assert torch.equal(bytes_[~edge].double(), exponent[~edge] + 127)


@pytest.mark.parametrize("block", (16, 32, 64, 128))
def test_quest_scale_is_equivariant_up_to_the_largest_float(block, gen):
    """2^k · x has scale byte + k: no square, sum or square root overflows on the way."""
    x = torch.randn(64, block, generator=gen)
    x = x / x.abs().amax(-1, keepdim=True)
    x[0, :] = torch.where(torch.arange(block) % 2 == 0, 1.0, -1.0)
    for sigma in ("centred", "guarded", "rms"):
        spec = QuantSpec(block=block, rule="quest", sigma=sigma)
        base = e8m0_scale(x * 2.0**10, spec).to(torch.int32)
        for k in range(11, 128):
            assert torch.equal(e8m0_scale(x * 2.0**k, spec).to(torch.int32), base + k - 10), (sigma, k)


def test_quest_at_the_largest_float():
    x = torch.full((1, 32), FLT_MAX)
    x[:, ::2] *= -1
    assert e8m0_scale(x, QUEST).item() == 126 + 127
    assert e8m0_scale(x, QuantSpec(rule="quest", power="nearest")).item() == 254


def test_quest_nearest_steps_at_root_two():
    """σ = 2^k·√2/clip: the byte changes where the target crosses √2, and floor does not."""
    sigma = torch.tensor([0.999999, 1.000001], dtype=torch.float64) * math.sqrt(2) / CLIP
    x = (sigma.unsqueeze(-1) * torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(16)).to(torch.float32)
    assert e8m0_scale(x, QuantSpec(rule="quest", power="nearest")).tolist() == [127, 128]
    assert e8m0_scale(x, QuantSpec(rule="quest", power="floor")).tolist() == [127, 127]


def test_quest_of_tiny_blocks_stops_at_1e_8():
    x = torch.full((1, 32), 1e-30)
    x[:, ::2] *= -1
    assert e8m0_scale(x, QUEST).item() == 127 + math.floor(math.log2(1e-8))


def test_centred_variance_never_negative(gen):
    """A constant block: the subtraction cancels to rounding noise of either sign, never NaN."""
    x = torch.rand(5000, 1, generator=gen).expand(5000, 32) * 1e4
    assert e8m0_scale(x.contiguous(), QUEST).max() < 254


def test_guard_binds_only_when_the_mean_dominates(gen):
    ordinary = torch.randn(2000, 32, generator=gen)
    guarded = QuantSpec(rule="quest", sigma="guarded")
    assert torch.equal(e8m0_scale(ordinary, QUEST), e8m0_scale(ordinary, guarded))
    shifted = ordinary * 1e-3 + 1
    assert bool((e8m0_scale(shifted, guarded) > e8m0_scale(shifted, QUEST)).all())
    assert e8m0_scale(shifted, guarded).unique().tolist() == [127 + math.floor(math.log2(CLIP / 4))]
