"""The fused CPU kernels against the reference, bit for bit."""

import itertools
import random

import pytest
import torch

from quartet.kernels import reference as ref
from quartet.kernels.cpu import ops
from quartet.kernels.spec import QuantSpec

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEED = torch.tensor(-0x7654321089ABCDEF)
SITE = 0xFEDCBA98
SHAPES = ((1, 1), (3, 5), (1, 257), (17, 96), (33, 130), (40, 1), (16, 512), (19, 384))
ROTATIONS = (0, 16, 32, 64, 128)
SPECS = [
    QuantSpec(block=block, rule=rule, rounding=rounding, sigma=sigma, power=power,
              mask=rule in ("quest", "floor", "even"))
    for block in (16, 32, 64, 128)
    for rule, sigma, power in (
        ("floor", "guarded", "floor"), ("ceil", "guarded", "floor"), ("headroom", "guarded", "floor"),
        ("even", "guarded", "floor"),
        ("quest", "guarded", "floor"), ("quest", "centred", "nearest"), ("quest", "rms", "floor"))
    for rounding in ("nearest", "stochastic")
]

pytestmark = pytest.mark.skipif(ops.unavailable() is not None, reason=f"CPU kernels not available: {ops.unavailable()}")


def sample(rows, cols, generator):
    """Values over many octaves, with signed zeros, outliers and constant, tiny, huge and non-finite blocks."""
    x = torch.randn(rows, cols, generator=generator)
    x = x * torch.exp(3 * torch.randn(rows, cols, generator=generator))
    x[torch.rand(rows, cols, generator=generator) < 0.05] = 0.0
    x[torch.rand(rows, cols, generator=generator) < 0.03] = -0.0
    if rows > 12 and cols > 40:
        x[0] = 0
        x[1] *= 1e-38
        x[2] *= 1e30
        x[3, 5], x[4, 7], x[6, 40] = float("inf"), float("nan"), -float("inf")
        x[5] = 3.0
        x[7] = 1e-45
        x[8] = 3.4e38
        x[9, 3:] = 0
        x[10] = torch.randint(-12, 13, (cols,), generator=generator) / 2
        x[11] = torch.finfo(torch.float32).max * torch.where(x[11] > 0, 1.0, -1.0)
    return x


def layouts(x):
    """The same values row-major, transposed, and as a slice with a step."""
    yield x.contiguous()
    yield x.t().contiguous().t()
    yield torch.stack((x, -x), dim=-1).flatten(1)[:, ::2]
    yield torch.cat((x, x), dim=1)[:, : x.shape[1]]


def bits(x):
    """Integers that are equal exactly when the values are, with one NaN."""
    if not x.dtype.is_floating_point:
        return x
    same_nan = torch.where(x.isnan(), torch.full_like(x, float("nan")).abs(), x)
    return same_nan.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def assert_same(actual, expected, what):
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, what
    assert torch.equal(bits(actual), bits(expected)), what


def signs_for(n, generator):
    return None if n in (0, 16) else 1.0 - 2 * torch.randint(0, 2, (n,), generator=generator)


def expected_quantize(x, n, signs, spec, dtype):
    """The reference chain; codes of blocks whose scale is NaN are not compared."""
    rotated = ref.hadamard(x, n, signs) if n else x
    codes, scales, mask = ref.quantize(rotated, spec, SEED, SITE)
    return codes, scales, mask, ref.dequantize(codes, scales, QuantSpec(block=spec.block, rule="floor"), dtype)


def assert_quantized(actual, expected, block, what):
    codes, scales, mask, values = actual
    assert_same(scales, expected[1], what)
    assert_same(mask, expected[2], what)
    assert_same(values, expected[3], what)
    assert codes.shape == expected[0].shape, what
    numbers = (scales != 255).repeat_interleave(block // 2, dim=1)
    assert torch.equal(codes[numbers], expected[0][numbers]), what


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotation", ROTATIONS)
def test_rotate_quantize(rotation, dtype):
    generator = torch.Generator().manual_seed(rotation)
    choose = random.Random(rotation)
    for rows, cols in SHAPES:
        signs = signs_for(rotation, generator)
        plain = sample(rows, cols, generator).to(dtype)
        for x in layouts(plain):
            for spec in choose.sample(SPECS, 3):
                out = choose.choice(DTYPES)
                actual = ops.rotate_quantize(x, rotation=rotation, signs=signs, spec=spec, seed=SEED, site=SITE,
                                             packed=True, values=out)
                what = f"{spec} of {[rows, cols]} strides {x.stride()} rotation {rotation} to {out}"
                assert_quantized(actual, expected_quantize(plain, rotation, signs, spec, out), spec.block, what)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_spec(spec):
    generator = torch.Generator().manual_seed(spec.block)
    x = sample(21, 300, generator)
    for rotation in (0, 32, 128):
        signs = signs_for(rotation, generator)
        actual = ops.rotate_quantize(x, rotation=rotation, signs=signs, spec=spec, seed=SEED, site=SITE, packed=True,
                                     values=torch.float32)
        expected = expected_quantize(x, rotation, signs, spec, torch.float32)
        assert_quantized(actual, expected, spec.block, f"{spec} rotation {rotation}")


@pytest.mark.parametrize("transpose", (False, True))
@pytest.mark.parametrize("in_spec", [QuantSpec(rule="quest", mask=True), QuantSpec(block=16, rule="headroom"),
                                     QuantSpec(block=128, rule="ceil")], ids=str)
def test_requantize(in_spec, transpose):
    generator = torch.Generator().manual_seed(7)
    choose = random.Random(7)
    for rows, cols in ((1, 32), (40, 96), (130, 64), (33, 300)):
        codes, scales, _ = ref.quantize(sample(rows, cols, generator), in_spec)
        values = ref.dequantize(codes, scales, in_spec)
        source = values.t() if transpose else values
        for rotation, spec in itertools.product(ROTATIONS, choose.sample(SPECS, 4)):
            signs = signs_for(rotation, generator)
            actual = ops.requantize(codes, scales, in_spec, transpose=transpose, rotation=rotation, signs=signs,
                                    spec=spec, seed=SEED, site=SITE, packed=True, values=torch.bfloat16)
            expected = expected_quantize(source, rotation, signs, spec, torch.bfloat16)
            assert_quantized(actual, expected, spec.block, f"{in_spec} {[rows, cols]} to {spec} rotation {rotation}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gain", (False, True))
def test_dequantize_every_code_and_scale(dtype, gain):
    for block, rule in ((16, "headroom"), (32, "headroom"), (32, "quest"), (128, "ceil")):
        spec = QuantSpec(block=block, rule=rule)
        codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
        scales = torch.arange(256, dtype=torch.uint8).unsqueeze(1).expand(256, 512 // block).contiguous()
        expected = ref.dequantize(codes, scales, spec if gain else QuantSpec(block=block, rule="floor"), dtype)
        assert_same(ops.dequantize(codes, scales, spec, dtype, gain), expected, f"{spec} to {dtype}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotation", ROTATIONS)
def test_mask_rotate(rotation, dtype):
    generator = torch.Generator().manual_seed(rotation)
    for rows, cols, keep in ((1, 16, 16), (1, 128, 100), (33, 384, 384), (18, 40, 37), (2, 8, 3), (20, 256, 0),
                             (9, 512, 500)):
        plain = sample(rows, cols, generator).to(dtype)
        if rotation:
            plain[~plain.isfinite()] = 1
        mask = torch.randint(0, 256, (rows, cols // 8), generator=generator, dtype=torch.uint8)
        signs = signs_for(rotation, generator)
        for x, bitmask, gain, out in itertools.product(layouts(plain), (None, mask), (1.0, -16 / 9), DTYPES):
            actual = ops.mask_rotate(x, bitmask, rotation=rotation, signs=signs, gain=gain, cols=keep, dtype=out)
            expected = x.to(torch.float32) * gain
            expected = expected if bitmask is None else ref.apply_mask(expected, bitmask)
            expected = ref.hadamard(expected, rotation, signs, True, out) if rotation else expected.to(out)
            assert_same(actual, expected[:, :keep], f"{[rows, cols]} keep {keep} masked {bitmask is not None} to {out}")


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_every_half_is_read_and_every_rounding_is_right(dtype):
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(256, 256)
    read = ops.mask_rotate(every, None, rotation=0, signs=None, gain=1.0, cols=256, dtype=torch.float32)
    assert_same(read, every.float(), "read")
    finite = read.nan_to_num(0.0, 0.0, 0.0).reshape(-1)
    half_step = 1 << (15 if dtype == torch.bfloat16 else 12)  # and a subnormal float16 has fewer bits
    steps = torch.tensor([0, 1, half_step - 1, half_step, half_step + 1, 1 << 20], dtype=torch.int32)
    near = (finite.view(torch.int32).unsqueeze(0) + steps.unsqueeze(1)).view(torch.float32)
    written = ops.mask_rotate(near, None, rotation=0, signs=None, gain=1.0, cols=near.shape[1], dtype=dtype)
    assert_same(written, near.to(dtype), "write")


def test_threads_do_not_change_anything():
    generator = torch.Generator().manual_seed(3)
    x = sample(70, 520, generator)
    forward, backward = QuantSpec(rule="quest", mask=True), QuantSpec(rule="headroom", rounding="stochastic")

    def everything():
        first = ops.rotate_quantize(x, rotation=32, signs=None, spec=forward, seed=None, site=0, packed=True,
                                    values=torch.float32)
        second = ops.rotate_quantize(x.t(), rotation=32, signs=None, spec=backward, seed=SEED, site=1, packed=True,
                                     values=torch.bfloat16)
        third = ops.requantize(first[0], first[1], forward, transpose=True, rotation=32, signs=None, spec=backward,
                               seed=SEED, site=2, packed=True, values=torch.float32)
        rotated = ops.mask_rotate(first[3], first[2], rotation=32, signs=None, gain=2.0, cols=520, dtype=torch.float32)
        return (*first, *second, *third, rotated, ops.dequantize(first[0], first[1], forward, torch.float16, True))

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = everything()
        torch.set_num_threads(3)
        for actual, expected in zip(everything(), one, strict=True):
            assert_same(actual, expected, "threads")
    finally:
        torch.set_num_threads(before)


def test_seed_and_site_choose_the_bits():
    x = torch.rand(16, 64) + 0.25
    spec = QuantSpec(rule="headroom", rounding="stochastic")
    drawn = [
        ops.rotate_quantize(x, rotation=0, signs=None, spec=spec, seed=torch.tensor(seed), site=site, packed=True,
                            values=None)[0]
        for seed, site in ((1, 0), (1 + (1 << 40), 0), (1, 1), (1, 1 << 31))
    ]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))


def test_only_what_is_asked_for():
    x = torch.randn(4, 64)
    spec = QuantSpec(rule="quest")
    codes, scales, mask, values = ops.rotate_quantize(x, rotation=32, signs=None, spec=spec, seed=None, site=0,
                                                      packed=False, values=torch.bfloat16)
    assert [t.shape for t in (codes, scales, mask)] == [(0,)] * 3 and values.shape == (4, 64)
    values = ops.rotate_quantize(x, rotation=32, signs=None, spec=spec, seed=None, site=0, packed=True, values=None)[3]
    assert values.shape == (0,)


@pytest.mark.parametrize("shape", ((0, 5), (5, 0), (0, 0)))
def test_empty(shape):
    rows, cols = shape
    padded = -(-cols // 32) * 32
    spec = QuantSpec(rule="quest", mask=True)
    codes, scales, mask, values = ops.rotate_quantize(
        torch.zeros(shape), rotation=32, signs=None, spec=spec, seed=None, site=0, packed=True, values=torch.float32)
    assert codes.shape == (rows, padded // 2) and scales.shape == (rows, padded // 32)
    assert mask.shape == (rows, padded // 8) and values.shape == (rows, padded)
    assert ops.dequantize(codes, scales, spec).shape == (rows, padded)
    back = ops.mask_rotate(values, mask, rotation=32, signs=None, gain=1.0, cols=cols, dtype=torch.float32)
    assert back.shape == shape


def test_declines_with_a_reason():
    assert ops.supports(QuantSpec(), 32, torch.float32) is None
    assert "e4m3" in ops.supports(QuantSpec(element="e4m3"), 0, torch.float32)
    assert "48" in ops.supports(QuantSpec(), 48, torch.float32)
    assert "float64" in ops.supports(QuantSpec(), 0, torch.float64)
    ask = dict(rotation=0, signs=None, seed=None, site=0, packed=True, values=None)
    with pytest.raises(ValueError, match="needs a seed"):
        ops.rotate_quantize(torch.ones(2, 32), spec=QuantSpec(rounding="stochastic"), **ask)
    with pytest.raises(ValueError, match="float64"):
        ops.rotate_quantize(torch.ones(2, 32, dtype=torch.float64), spec=QuantSpec(), **ask)
    with pytest.raises(ValueError, match=r"\[2, 3, 32\]"):
        ops.rotate_quantize(torch.ones(2, 3, 32), spec=QuantSpec(), **ask)
    with pytest.raises(ValueError, match="32 signs"):
        ops.rotate_quantize(torch.ones(2, 32), spec=QuantSpec(), **{**ask, "rotation": 32, "signs": torch.ones(16)})
    with pytest.raises(ValueError, match=r"scales \[R, K/32\]"):
        ops.dequantize(torch.zeros(2, 16, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.uint8), QuantSpec())
    with pytest.raises(ValueError, match=r"uint8 \[2, 4\]"):
        ops.mask_rotate(torch.ones(2, 32), torch.zeros(2, 3, dtype=torch.uint8), rotation=32, signs=None, gain=1.0,
                        cols=32, dtype=torch.float32)
