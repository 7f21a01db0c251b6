"""NVFP4 in its three rules, FP8 in blocks and tiles, INT8, ternary, delayed scales: numbers, edges, products."""

import numpy as np
import pytest
import torch
from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize

from quartet.kernels.reference import dequantize, hadamard, largest_magnitude, quantize, scaled_mm, unpack_nibbles
from quartet.kernels.reference.formats.nvfp4 import e4m3_stochastic, tensor_scales
from quartet.kernels.spec import QuantSpec

NVFP4, TILE, SR, FOUR_SIX, EDEN = map(QuantSpec.parse, (
    "e2m1/16 e4m3 amax nearest", "e2m1/16x16 e4m3 amax nearest", "e2m1/16 e4m3 amax stochastic",
    "e2m1/16 e4m3 four_six nearest", "e2m1/16 e4m3 eden stochastic"))
FP8_BLOCK, FP8_TILE, INT8_ROW, INT8_TENSOR, TERNARY, E2M1_ROW, DELAYED = map(QuantSpec.parse, (
    "e4m3/128 fp32 amax_pow2 nearest", "e4m3/128x128 fp32 amax_pow2 nearest", "int8/row fp32 amax nearest",
    "int8/tensor fp32 amax nearest", "ternary/tensor fp32 absmean nearest", "e2m1/row fp32 amax nearest",
    "e4m3/tensor fp32 delayed nearest"))
ALL = (NVFP4, TILE, SR, FOUR_SIX, EDEN, FP8_BLOCK, FP8_TILE, INT8_ROW, INT8_TENSOR, TERNARY, E2M1_ROW, DELAYED)
every_format = pytest.mark.parametrize("spec", ALL, ids=str)
GRID = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)


@pytest.fixture
def gen():
    return torch.Generator().manual_seed(7)


def encode(x, spec, seed=5, site=3):
    amax = largest_magnitude(x)
    codes, scales, _ = quantize(x, spec, torch.tensor(seed), site, amax=amax)
    return codes, scales, amax


def values(x, spec, seed=5, site=3):
    codes, scales, amax = encode(x, spec, seed, site)
    return dequantize(codes, scales, spec, amax=amax)[:, : x.shape[1]]


@pytest.mark.parametrize("spec, expected", (
    (NVFP4, 9.05), (TILE, 12.4), (FOUR_SIX, 7.56), (EDEN, 9.74), (FP8_BLOCK, 0.705), (FP8_TILE, 0.705)), ids=str)
def test_error_of_gaussian_data(spec, expected, gen):
    x = torch.randn(512, 2048, generator=gen)
    error = 1e3 * float(((values(x, spec) - x) ** 2).mean() / (x**2).mean())
    assert error == pytest.approx(expected, rel=0.02)


# NVFP4

def published_nvfp4(x):
    """(codes, scales) by NVIDIA's order of fp32 operations, in numpy."""
    one, largest = np.float32(1), np.finfo(np.float32).max
    blocks = x.numpy().reshape(x.shape[0], -1, 16)
    encode = min(np.float32(448 * 6) / np.abs(blocks).max(), largest)
    scales = np.abs(blocks).max(-1) * (encode * (one / np.float32(6)))
    scales = torch.from_numpy(np.minimum(scales, np.float32(448))).to(torch.float8_e4m3fn)
    decode = np.minimum(one / (scales.float().numpy() * (one / encode)), largest)
    scaled = np.clip(blocks * decode[..., None], -6, 6)
    distance = np.abs(np.abs(scaled)[..., None] - GRID)
    nearest = distance.min(-1, keepdims=True) == distance
    first, last = nearest.argmax(-1), 7 - nearest[..., ::-1].argmax(-1)
    index = np.where(first % 2 == 0, first, last)
    return torch.from_numpy(index + 8 * np.signbit(scaled)).reshape(x.shape).to(torch.uint8), scales


def test_nvfp4_is_the_published_arithmetic(gen):
    x = torch.randn(64, 256, generator=gen) * torch.exp2(torch.randint(-6, 6, (64, 1), generator=gen).float())
    x[3, :16] = torch.tensor([0.25, -0.75, 1.25, -2.5, 5.0, 6.0, 0.0, -0.0] * 2)
    codes, scales, _ = encode(x, NVFP4)
    expected, expected_scales = published_nvfp4(x)
    assert torch.equal(scales.view(torch.uint8), expected_scales.view(torch.uint8))
    assert torch.equal(unpack_nibbles(codes), expected)


def test_nvfp4_agrees_with_torchao_up_to_its_order_of_operations(gen):
    x = torch.randn(256, 512, generator=gen)
    codes, scales, amax = encode(x, NVFP4)
    theirs, packed = nvfp4_quantize(x, per_tensor_scale=amax[0, 0] / (448 * 6))
    assert float((scales.float() == theirs.reshape(scales.shape).float()).float().mean()) > 0.999
    assert float((codes == packed.view(torch.uint8)).float().mean()) > 0.999


def test_a_tile_has_the_same_codes_in_both_orientations(gen):
    x = torch.randn(48, 80, generator=gen)
    codes, scales, _ = encode(x, TILE)
    across, across_scales, _ = encode(x.t().contiguous(), TILE)
    assert torch.equal(unpack_nibbles(codes), unpack_nibbles(across).t())
    assert torch.equal(scales.float(), across_scales.float().t()) and scales.shape == (3, 5)
    codes, scales, _ = encode(x, FP8_TILE)
    across, across_scales, _ = encode(x.t().contiguous(), FP8_TILE)
    assert torch.equal(codes[:48, :80].float(), across[:80, :48].float().t()) and torch.equal(scales, across_scales.t())


def test_four_six_takes_the_smaller_error_of_each_block(gen):
    x = torch.randn(64, 256, generator=gen)
    x[0, 0] = 8.0  # the tensor's largest magnitude
    x[1, :16] = torch.tensor([3.0, 4.0] * 8)  # exact under both scales: 6 stays
    x[2, :16] = torch.tensor([2.25, 3.0, 1.5, 0.75] * 4)  # 3, 4, 2, 1 when 3 becomes 4; under 6, 4.5 is not there
    codes, scales, amax = encode(x, FOUR_SIX)
    encoder, _ = tensor_scales(amax, FOUR_SIX)
    six = (x.reshape(64, 16, 16).abs().amax(-1) * (encoder * (1 / 6))).to(torch.float8_e4m3fn).float()
    four = (x.reshape(64, 16, 16).abs().amax(-1) * (encoder * (1 / 4))).to(torch.float8_e4m3fn).float()
    taken = scales.float() == four
    assert torch.equal(scales.float(), torch.where(taken, four, six)) and 0.2 < float(taken.float().mean()) < 0.6
    assert bool(taken[2, 0])
    assert float(((values(x, FOUR_SIX) - x) ** 2).mean()) < float(((values(x, NVFP4) - x) ** 2).mean())


def test_e4m3_stochastic_is_unbiased_between_neighbours_and_keeps_what_is_exact(gen):
    every = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    bits = torch.randint(0, 512, (127,), generator=gen)
    assert torch.equal(e4m3_stochastic(every, bits).float(), every)
    low, high = every[:-1], every[1:]
    for share in (1 / 8, 0.5, 0.75):
        x = low + share * (high - low)
        drawn = torch.stack([e4m3_stochastic(x, torch.full((126,), r)).float() for r in range(512)])
        assert bool(((drawn == low) | (drawn == high)).all())
        assert float((drawn == high).float().mean(0).sub(share).abs().max()) <= 1 / 512
    assert torch.equal(e4m3_stochastic(torch.tensor([1e4]), torch.tensor([511])).float(), torch.tensor([448.0]))
    assert bool(e4m3_stochastic(torch.tensor([float("nan")]), torch.tensor([3])).float().isnan())


def test_eden_is_unbiased_over_rotations(gen):
    x = torch.randn(8, 256, generator=gen)
    total, draws = torch.zeros_like(x), 600
    for seed in range(draws):
        signs = 1.0 - 2.0 * torch.randint(0, 2, (128,), generator=gen)
        total += hadamard(values(hadamard(x, 128, signs), EDEN, seed), 128, signs, inverse=True)
    error = float(((total / draws - x) ** 2).mean() / (x**2).mean())
    assert error < 2.5 * 9.74e-3 / draws  # one draw's error over their number; a bias of 0.5 % would be 2.5e-5
    nearest = torch.zeros_like(x)
    for _ in range(100):
        signs = 1.0 - 2.0 * torch.randint(0, 2, (128,), generator=gen)
        nearest += hadamard(values(hadamard(x, 128, signs), NVFP4), 128, signs, inverse=True)
    assert float((nearest / 100 * x).sum() / (x * x).sum()) < 0.9975  # to nearest, the length shrinks


def test_eden_gives_each_group_its_length_back(gen):
    x = torch.randn(64, 1024, generator=gen)
    got = values(x, EDEN)
    along = (got * x).reshape(64, 8, 128).sum(-1) / (x * x).reshape(64, 8, 128).sum(-1)
    assert float(along.sub(1).abs().mean()) < 0.012 and abs(float(along.mean()) - 1) < 2e-3


# integers

def test_int8_and_ternary_are_their_formulas(gen):
    x = torch.randn(40, 96, generator=gen)
    codes, scales, _ = encode(x, INT8_ROW)
    assert torch.equal(codes, (x * (127 / x.abs().amax(1, keepdim=True))).round().to(torch.int8))
    assert codes.abs().amax(1).eq(127).all() and scales.shape == (40, 1)
    codes, scales, _ = encode(x, TERNARY)
    assert torch.equal(codes, (x * (1 / x.abs().mean())).round().clamp(-1, 1).to(torch.int8))
    torch.testing.assert_close(scales[0, 0], x.abs().mean())
    assert torch.equal(encode(torch.zeros(4, 16), TERNARY)[0], torch.zeros(4, 16, dtype=torch.int8))


# delayed scales

def test_a_delayed_scale_saturates_and_keeps_infinities_visible():
    x = torch.tensor([[0.5, -3.0, 2.0, float("inf")]])
    codes, scales, _ = quantize(x, DELAYED, amax=torch.tensor([1.0]))
    got = dequantize(codes, scales, DELAYED)
    assert got[0, :3].tolist() == [0.5, -1.0, 1.0] and bool(got[0, 3].isnan())
    same = quantize(x[:, :3], DELAYED, amax=torch.tensor([3.0]))
    current = quantize(x[:, :3], QuantSpec.parse("e4m3/tensor fp32 amax nearest"))
    assert torch.equal(same[0].float(), current[0].float()) and torch.equal(same[1], current[1])
    with pytest.raises(ValueError, match="needs amax"):
        quantize(x, DELAYED)


# all of them

@every_format
@pytest.mark.parametrize("rows, cols", ((16, 128), (33, 100), (1, 18)))
def test_a_product_is_that_of_the_values(spec, rows, cols, gen):
    a, b = torch.randn(rows, cols, generator=gen), torch.randn(24, cols, generator=gen)
    (ac, as_, aa), (bc, bs, ba) = encode(a, spec), encode(b, spec, site=4)
    got = scaled_mm(ac, as_, bc, bs, spec, spec, a_amax=aa, b_amax=ba)
    expected = dequantize(ac, as_, spec, amax=aa).double() @ dequantize(bc, bs, spec, amax=ba).double().t()
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    half = scaled_mm(ac, as_, bc, bs, spec, spec, torch.bfloat16, a_amax=aa, b_amax=ba)
    torch.testing.assert_close(half.double(), expected, rtol=2e-2, atol=2e-2)


@every_format
def test_zeros_stay_and_what_is_not_finite_is_seen(spec, gen):
    assert not values(torch.zeros(20, 130), spec).any()
    x = torch.randn(20, 130, generator=gen)
    for bad in (float("nan"), float("inf"), -float("inf")):
        y = x.clone()
        y[3, 5] = bad
        assert not values(y, spec)[3, 5].isfinite()
    x[7] *= 1e-30
    assert values(x, spec).isfinite().all() and values(x * 1e30, spec).isfinite().all()


@every_format
def test_any_strides_and_dtypes(spec, gen):
    x = torch.randn(130, 40, generator=gen)
    assert torch.equal(values(x.t(), spec), values(x.t().contiguous(), spec))
    assert torch.equal(values(x.bfloat16(), spec), values(x.bfloat16().float(), spec))
