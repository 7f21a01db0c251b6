"""Quantise, dequantise and the scaled product: golden vectors, error anchors, stochastic rounding, edges."""

import math

import pytest
import torch

from quartet.kernels.reference import (
    dequantize,
    e2m1_decode,
    e8m0_decode,
    e8m0_reciprocal,
    hadamard,
    pack_bits,
    quantize,
    scaled_mm,
    unpack_bits,
    unpack_nibbles,
)
from quartet.kernels.spec import QuantSpec

RELEASED = QuantSpec(rule="quest", sigma="centred", mask=True)
GUARDED = QuantSpec(rule="quest", sigma="guarded", mask=True)
HEADROOM = QuantSpec(rule="headroom")
STOCHASTIC = QuantSpec(rule="headroom", rounding="stochastic")
FLT_MAX = torch.finfo(torch.float32).max
EVERY = (RELEASED, GUARDED, HEADROOM, STOCHASTIC, QuantSpec(rule="floor"), QuantSpec(rule="ceil"),
         QuantSpec(rule="even"), QuantSpec(rule="even", rounding="stochastic", mask=True),
         QuantSpec("e4m3"), QuantSpec("e5m2", rule="floor"))


def roundtrip(x, spec, seed=0):
    codes, scales, _ = quantize(x, spec, torch.tensor(seed))
    return dequantize(codes, scales, spec)[:, : x.shape[1]]


def neighbours(x, scales):
    """Float64: the representable value at or below x, the step to the one above, and the fraction between."""
    unit = e8m0_decode(scales).double().repeat_interleave(32, -1) * 4 / 3
    grid = torch.tensor([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    scaled = x.double() / unit
    index = (torch.searchsorted(grid, scaled, right=True) - 1).clamp(0, 13)
    low, step = grid[index], grid[index + 1] - grid[index]
    return low * unit, step * unit, (scaled - low) / step


# --- golden vectors ---------------------------------------------------------------------------------------------


def test_quest_equals_the_release(golden):
    g = golden("mxfp4_quest_fwd")
    codes, scales, mask = quantize(hadamard(g["x"], 32), RELEASED)
    assert torch.equal(dequantize(codes, scales, RELEASED), g["quartet_dq"])
    assert torch.equal(unpack_bits(mask), g["quartet_mask"])


def test_guard_changes_one_golden_block(golden):
    """The vectors hold one block whose centred deviation collapses; every other block is as released."""
    g = golden("mxfp4_quest_fwd")
    rotated = hadamard(g["x"], 32)
    codes, scales, _ = quantize(rotated, GUARDED)
    changed = (dequantize(codes, scales, GUARDED) != g["quartet_dq"]).reshape(128, 8, 32).any(-1)
    assert changed.sum() == 1
    block = rotated.reshape(128, 8, 32)[changed].double()
    assert block.var(unbiased=False) < block.square().mean() / 16


@pytest.mark.parametrize("n", (32, 64, 128))
@pytest.mark.parametrize("absmax", (False, True))
def test_qutlass(golden, sylvester, n, absmax):
    """QuTLASS rotates with a bf16 matrix: 1/√n rounded to bf16, exact for n = 64, 1.07e-4 small for 32 and 128.

    With that factor every code, mask and scale is equal, up to the sign of zeros and the one all-zero block
    (it stores 2^floor(log2 1e-8) where we store 1). With ours only elements within 1.1e-4 of a tie differ.
    """
    g = golden("mxfp4_quest_fwd")
    spec, name = (HEADROOM, f"qutlass{n}_absmax") if absmax else (RELEASED, f"qutlass{n}")
    theirs, offset = unpack_nibbles(g[f"{name}_e2m1"]), 2 if absmax else 0  # theirs carries 1/3, ours 4/3
    factor = torch.tensor(1 / math.sqrt(n)).bfloat16().double()
    rounded = ((g["x"].double().reshape(128, -1, n) @ sylvester(n)) * factor).reshape(128, 256).float()

    def compare(rotated):
        codes, scales, mask = quantize(rotated, spec)
        codes = unpack_nibbles(codes)
        scale_differs = scales.int() + offset != g[f"{name}_e8m0"].int()
        zero_block = (rotated == 0).reshape(128, 8, 32).all(-1)
        assert not (scale_differs & ~zero_block).any() and zero_block.sum() <= 1
        clipped = torch.zeros_like(codes, dtype=torch.bool) if absmax else unpack_bits(mask) != g[f"{name}_mask"]
        return (codes != theirs) & ((codes | theirs) & 7 != 0), clipped, scales

    codes_differ, mask_differs, _ = compare(rounded)
    assert not codes_differ.any() and not mask_differs.any()

    rotated = hadamard(g["x"], n)
    codes_differ, mask_differs, scales = compare(rotated)
    scaled = (rotated * e8m0_reciprocal(scales).repeat_interleave(32, -1)).abs() * (0.75 if absmax else 1)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    distance = ((scaled.unsqueeze(-1) - ties).abs() / ties).amin(-1)
    assert bool((distance[codes_differ] < 1.1e-4).all()) and codes_differ.sum() <= 16
    assert bool(((scaled - 6).abs()[mask_differs] < 6 * 1.1e-4).all()) and mask_differs.sum() <= 2
    if n == 64:
        assert not codes_differ.any() and not mask_differs.any()
    if not absmax:
        assert torch.equal(pack_bits(g[f"{name}_mask"]), g[f"{name}_maskpacked"])
    unchanged = ~codes_differ & (theirs & 7 != 0)
    codes, scales, _ = quantize(rotated, spec)
    assert torch.allclose(dequantize(codes, scales, spec)[unchanged], g[f"{name}_dq"][unchanged], rtol=1.2e-7, atol=0)


def test_headroom_nearest_golden(golden):
    g = golden("mxfp4_sr_bwd")
    rotated = hadamard(g["v"], 32)
    assert torch.allclose(rotated.double(), g["vh"], rtol=0, atol=3e-7 * g["vh"].abs().max().item())
    codes, scales, _ = quantize(rotated, HEADROOM)
    assert torch.equal(dequantize(codes, scales, HEADROOM), g["rtn"])
    assert torch.equal(dequantize(codes, scales, HEADROOM), g["qutlass_rtne_dq"])
    assert torch.equal(codes, g["qutlass_e2m1"])
    assert torch.equal(scales + 2, g["qutlass_e8m0"])
    assert torch.allclose(e8m0_decode(scales).double() * 4 / 3, g["scale_with_4over3"], rtol=1e-12)


# --- stochastic rounding ----------------------------------------------------------------------------------------


def test_stochastic_statistics_golden(golden):
    """8192 draws of ours against theory and against the released kernel's 8192 draws.

    The index has nine fraction bits, so P(up) is off by at most 1/1024 and the mean by at most step/1024; the mean of n
    draws has deviation sd/√n. Of 512 elements the largest of that many normal deviates is expected near 3.1.
    """
    g, n = golden("mxfp4_sr_bwd"), 8192
    rotated = hadamard(g["v"], 32)
    codes, scales, _ = quantize(rotated.repeat(n, 1), STOCHASTIC, torch.tensor(5), 1)
    draws = dequantize(codes, scales, STOCHASTIC).reshape(n, 16, 32).double()
    low, step, p = neighbours(rotated, scales[:16])
    assert torch.allclose(step**2 * p * (1 - p), g["theory_var"], rtol=1e-3, atol=1e-6 * step.square().max())
    likely = (p > 1 / 256) & (p < 255 / 256)  # both neighbours surely occur in 8192 draws
    for ours, theirs in ((draws.amin(0), g["min"]), (draws.amax(0), g["max"])):
        assert torch.allclose(ours[likely], theirs[likely], rtol=1e-6) and likely.sum() > 490
    sd = g["theory_var"].sqrt()
    mean_error = (draws.mean(0) - g["vh"]).abs()
    assert bool((mean_error <= step / 1024 + 4.5 * sd / math.sqrt(n)).all())
    theirs = (draws.mean(0) - g["sample_mean"]).abs()
    assert bool((theirs <= step / 1024 + 4.5 * sd * math.sqrt(2 / n)).all())
    # var = step²·p(1−p); its own deviation is step²·√(p(1−p)(1−2p)²/n), and 1/1024 in p moves it by step²/1024
    slack = step**2 * (1 / 1024 + 5 * (p * (1 - p) * (1 - 2 * p) ** 2 / n).sqrt() + 10 / n)
    assert bool(((draws.var(0) - g["theory_var"]).abs() <= slack).all())
    assert abs(draws.var(0).sum() / g["theory_var"].sum() - 1) < 0.01
    assert abs(draws.var(0).sum() / g["sample_var"].sum() - 1) < 0.02


def test_stochastic_bias_is_what_nine_bits_leave(gen):
    """Over all random fractions the bias averages out; of one value it stays below step/1024."""
    x = torch.randn(1, 32, generator=gen)
    n = 1 << 15
    codes, scales, _ = quantize(x.repeat(n, 1), STOCHASTIC, torch.tensor(1))
    draws = dequantize(codes, scales, STOCHASTIC).double()
    step = draws.amax(0) - draws.amin(0)
    z = ((draws.mean(0) - x[0]).abs() - step / 1024).clamp(min=0) / (draws.std(0) + 1e-30) * math.sqrt(n)
    assert z.max() < 4.5
    many = torch.randn(4096, 256, generator=gen)
    error = (roundtrip(many, STOCHASTIC) - many).double()
    assert error.mean().abs() < 4.5 * error.std() / math.sqrt(error.numel())
    slope = (error * many).mean() / many.double().square().mean()  # a shrinking rounding would show here
    assert slope.abs() < 4.5 * error.std() / math.sqrt(error.numel())


def test_headroom_never_clips(gen):
    """Even the largest element of a block is rounded without bias: 3/4·amax stays below 6."""
    x = torch.randn(64, 32, generator=gen)
    x[:, 0] = torch.linspace(4.0, 7.9999995, 64)
    x[:, 1:] = x[:, 1:].clamp(-3, 3)
    mean = torch.stack([roundtrip(x, STOCHASTIC, seed) for seed in range(600)]).double().mean(0)
    assert ((mean - x)[:, 0]).abs().max() < 8 / 3 / 1024 + 4.5 * (4 / 3) / math.sqrt(600)


def test_seed_and_site_pick_the_bits(gen):
    x = torch.randn(16, 64, generator=gen)
    a = quantize(x, STOCHASTIC, torch.tensor(1), 2)[0]
    assert torch.equal(a, quantize(x, STOCHASTIC, torch.tensor(1), 2)[0])
    for seed, site in ((2, 2), (1, 3), (1 << 40 | 1, 2)):
        assert (a != quantize(x, STOCHASTIC, torch.tensor(seed), site)[0]).float().mean() > 0.2
    with pytest.raises(ValueError, match="'e2m1/32 e8m0 headroom stochastic' rounds stochastically and needs a seed"):
        quantize(x, STOCHASTIC)


# --- error anchors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec,anchor", (
    (QuantSpec(rule="ceil"), 13.5),
    (QuantSpec(rule="floor"), 13.3),
    (QuantSpec(rule="quest"), 22.3),
    (QuantSpec(rule="quest", sigma="centred"), 22.3),
    (QuantSpec(rule="quest", power="nearest"), 13.4),
    (QuantSpec(rule="even"), 12.7),
    (HEADROOM, 13.7),
    (STOCHASTIC, 27.8),
))
def test_relative_error_on_gaussian_blocks(spec, anchor, gen):
    """Relative MSE ×1e3, averaged over an octave of σ."""
    errors = []
    for i in range(16):
        x = torch.randn(512, 128, generator=gen) * 2.0 ** (i / 16)
        errors.append(((roundtrip(x, spec, i) - x).square().sum() / x.square().sum()).item() * 1e3)
    assert sum(errors) / 16 == pytest.approx(anchor, rel=0.025)


def test_relative_error_of_quest_floor_at_unit_deviation(gen):
    x = torch.randn(4096, 128, generator=gen)
    error = (roundtrip(x, QuantSpec(rule="quest")) - x).square().sum() / x.square().sum()
    assert error.item() * 1e3 == pytest.approx(26.9, rel=0.025)


@pytest.mark.parametrize("rule, shortest, longest", (("quest", 0.0, 0.7), ("even", 0.98, 1.01)))
def test_length_of_rotated_blocks_with_a_mean(rule, shortest, longest, gen):
    """<Q(x), x>/<x, x> of rotated sigmoids: H gathers their mean in one coefficient, 5.2 root mean squares."""
    octave = 2.0 ** torch.linspace(0, 1, 512).unsqueeze(1)
    x = hadamard(torch.randn(512, 256, generator=gen).sigmoid() * octave, 32)
    made = roundtrip(x, QuantSpec(rule=rule, sigma="rms", power="nearest"))
    assert shortest < ((made * x).sum() / x.square().sum()).item() < longest


def test_even_rounds_what_it_clips_as_a_longer_grid_would(gen):
    """Elements lie below 7 · scale, so that none is further from its code's value than 1, half a step of the grid."""
    x = torch.randn(4096, 128, generator=gen).exp() * torch.randn(4096, 128, generator=gen)
    codes, scales, mask = quantize(x, QuantSpec(rule="even", mask=True))
    scale = (2.0 ** (scales.float() - 127)).repeat_interleave(32, 1)
    assert (x.abs() / scale).max() < 7 and torch.equal(unpack_bits(mask), x.abs() / scale < 6)
    assert ((dequantize(codes, scales, QuantSpec(rule="even")) - x).abs() / scale).max() <= 1


# --- edges ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", EVERY, ids=str)
def test_zero_blocks(spec):
    codes, scales, mask = quantize(torch.zeros(2, 64), spec, torch.tensor(0))
    assert scales.tolist() == [[127, 127]] * 2
    assert not codes.view(torch.uint8).any()
    assert not dequantize(codes, scales, spec).any()
    assert mask.numel() == (16 if spec.mask else 0) and bool((mask == 255).all())


@pytest.mark.parametrize("spec", EVERY, ids=str)
@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
def test_nan_and_infinity_stay_visible(spec, bad, gen):
    x, w = torch.randn(4, 96, generator=gen), torch.randn(8, 96, generator=gen)
    x[1, 40] = bad
    codes, scales, _ = quantize(x, spec, torch.tensor(0))
    values = dequantize(codes, scales, spec)
    expected = torch.zeros(4, 96, dtype=torch.bool)
    expected[1, 32:64] = True
    assert torch.equal(values.isnan(), expected)
    b, b_scales, _ = quantize(w, spec, torch.tensor(0), 1)
    for dtype in (torch.float32, torch.bfloat16):
        y = scaled_mm(codes, scales, b, b_scales, spec, spec, dtype)
        assert bool(y[1].isnan().all()) and bool(y[[0, 2, 3]].isfinite().all())
        y = scaled_mm(b, b_scales, codes, scales, spec, spec, dtype)
        assert bool(y[:, 1].isnan().all()) and bool(y[:, [0, 2, 3]].isfinite().all())


@pytest.mark.parametrize("octave", (0.0, 0.25, 0.5, 0.75))
def test_outlier_at_index_0_after_rotation(octave, gen):
    """Row 0 of H spreads it evenly, so its block is nearly constant, c: the centred deviation collapses to the noise.

    The guard is σ ≥ c/4, so the largest value, 6 · 2^floor(log2(.487·c/4)), is between .365 c and .731 c.
    """
    x = torch.randn(1, 32, generator=gen) * 1e-3
    x[0, 0] = 100.0 * 2.0**octave
    rotated = hadamard(x, 32)

    def error(spec):
        codes, scales, _ = quantize(rotated, spec)
        return ((dequantize(codes, scales, spec) - rotated).norm() / rotated.norm()).item()

    assert error(RELEASED) > 0.999
    assert 1 - 0.7311 < error(GUARDED) < 1 - 0.365
    assert error(QuantSpec(rule="quest", sigma="rms")) < 0.2


def test_mask_is_strict():
    """Elements at exactly 6·scale are masked, as in the release."""
    x = torch.zeros(1, 32)
    x[0, :4] = torch.tensor([6.0, -6.0, 7.5, 5.9999995])
    _, scales, mask = quantize(x, QuantSpec(rule="floor", mask=True))
    assert scales.item() == 127 and unpack_bits(mask)[0, :4].tolist() == [False, False, False, True]


@pytest.mark.parametrize("spec", EVERY, ids=str)
def test_scaling_by_powers_of_two_shifts_the_scale_only(spec, gen):
    """From 2^-20 (the 1e-8 of quest) to 2^120; codes, signs of zero and masks are equal."""
    x = torch.randn(8, 64, generator=gen)
    if spec.rule == "quest":
        codes, scales, mask = quantize(x * 2.0**10, spec, torch.tensor(0))
        shifts = (40, 70, 110)
        base = 10
    else:
        codes, scales, mask = quantize(x, spec, torch.tensor(0))
        shifts, base = (-100, -20, 60, 120), 0
    for k in shifts:
        c, s, m = quantize(x * 2.0**k, spec, torch.tensor(0))
        assert torch.equal(c.view(torch.uint8), codes.view(torch.uint8)) and torch.equal(m, mask)
        assert torch.equal(s.int(), scales.int() + k - base)


@pytest.mark.parametrize("spec", [s for s in EVERY if s.rule != "quest"], ids=str)
def test_subnormals(spec):
    """Scale byte 0, 2^-127, is the smallest: values below it round on its grid, never to NaN."""
    tiny = torch.finfo(torch.float32).smallest_normal
    x = torch.linspace(-4 * tiny, 4 * tiny, 32).repeat(2, 1)
    x[1] *= 2.0**-12
    y = roundtrip(x, spec)
    assert bool(y.isfinite().all())
    coarsest = {"e2m1": 2.0, "e4m3": 2.0**-2, "e5m2": 2.0**-1}[spec.element] * spec.gain
    assert ((y - x).abs() <= coarsest * tiny).all()
    assert bool((y * x >= 0).all())


@pytest.mark.parametrize("spec", EVERY, ids=str)
def test_near_the_largest_float(spec, gen):
    """Never NaN, never the wrong sign; infinity only where the nearest code is beyond FLT_MAX."""
    x = (torch.rand(8, 64, generator=gen) * 2 - 1) * FLT_MAX
    x[0, 0], x[0, 1], x[1] = FLT_MAX, -FLT_MAX, FLT_MAX
    x[1, ::2] = -FLT_MAX
    codes, scales, _ = quantize(x, spec, torch.tensor(0))
    assert scales.max() < 255
    y = dequantize(codes, scales, spec)
    assert not y.isnan().any() and bool(((y.sign() == x.sign()) | (y == 0)).all())
    assert bool((x.abs()[y.isinf()] > 0.6 * FLT_MAX).all())
    half = roundtrip(x / 4, spec)
    assert bool(half.isfinite().all())
    assert (half - x / 4).double().norm() / (x / 4).double().norm() < 0.3


@pytest.mark.parametrize("spec", EVERY, ids=str)
@pytest.mark.parametrize("rows,cols", ((1, 32), (0, 64), (3, 33), (5, 100), (2, 1)))
def test_shapes_and_padding(spec, rows, cols, gen):
    x = torch.randn(rows, cols, generator=gen)
    codes, scales, mask = quantize(x, spec, torch.tensor(0))
    padded = -(-cols // 32) * 32
    assert codes.shape == (rows, padded * spec.bits // 8) and scales.shape == (rows, padded // 32)
    assert mask.shape == ((rows, padded // 8) if spec.mask else (0,))
    again = quantize(torch.nn.functional.pad(x, (0, padded - cols)), spec, torch.tensor(0))
    for a, b in zip((codes, scales, mask), again, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    assert not dequantize(codes, scales, spec)[:, cols:].any()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64))
@pytest.mark.parametrize("spec", EVERY, ids=str)
def test_dtypes_in(dtype, spec, gen):
    x = torch.randn(4, 64, generator=gen).to(dtype)
    for a, b in zip(quantize(x, spec, torch.tensor(0)), quantize(x.float(), spec, torch.tensor(0)), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("block", (16, 64, 128))
def test_other_blocks_share_one_scale(block, gen):
    spec = QuantSpec(block=block, rule="ceil")
    x = torch.randn(4, 256, generator=gen) * torch.tensor(2.0) ** torch.arange(256 // block).repeat_interleave(block)
    codes, scales, _ = quantize(x, spec)
    assert scales.shape == (4, 256 // block)
    expected = e2m1_decode(unpack_nibbles(codes)) * e8m0_decode(scales).repeat_interleave(block, -1)
    assert torch.equal(dequantize(codes, scales, spec), expected)
    assert (expected - x).norm() / x.norm() < 0.16


@pytest.mark.parametrize("a_spec,b_spec", ((RELEASED, RELEASED), (HEADROOM, HEADROOM), (HEADROOM, RELEASED)), ids=str)
def test_scaled_mm_is_the_product_of_dequantised_values(a_spec, b_spec, gen):
    a, b = torch.randn(5, 100, generator=gen), torch.randn(7, 100, generator=gen)
    ac, as_, _ = quantize(a, a_spec)
    bc, bs, _ = quantize(b, b_spec)
    exact = dequantize(ac, as_, a_spec).double() @ dequantize(bc, bs, b_spec).double().t()
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)):
        y = scaled_mm(ac, as_, bc, bs, a_spec, b_spec, dtype)
        assert y.dtype == dtype and y.shape == (5, 7)
        assert (y.double() - exact).norm() / exact.norm() < tolerance


@pytest.mark.parametrize("magnitude", (2.0**17, 2.0**-30))
def test_scaled_mm_to_half_keeps_operands_beyond_its_range(magnitude, gen):
    """The block scales of fp16 tensors leave the range of fp16 (a rotation grows a maximum by √n)."""
    spec = QuantSpec(rule="ceil")
    a, b = torch.randn(4, 64, generator=gen) * magnitude, torch.randn(4, 64, generator=gen) / magnitude
    (ac, as_, _), (bc, bs, _) = quantize(a, spec), quantize(b, spec)
    exact = dequantize(ac, as_, spec) @ dequantize(bc, bs, spec).t()
    assert torch.equal(scaled_mm(ac, as_, bc, bs, spec, spec, torch.float16), exact.half())


def test_dequantize_dtype(gen):
    codes, scales, _ = quantize(torch.randn(4, 64, generator=gen), GUARDED)
    values = dequantize(codes, scales, GUARDED)
    assert torch.equal(dequantize(codes, scales, GUARDED, torch.bfloat16).float(), values)  # two bits: exact
