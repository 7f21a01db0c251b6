"""The codecs of saved activations: error bounds, edge cases, and the same numbers in the op as in the reference."""

import math

import ml_dtypes
import pytest
import torch

import quartet.lowering.ir.ops.saved as saved_ops
from quartet.kernels.reference import Draw
from quartet.kernels.reference.formats.saved import (
    BITS,
    ROW,
    decode_saved,
    encode_saved,
    pack,
    saved_bytes_per_element,
    unpack,
)
from quartet.passes.residuals.partition import DRAW

CODECS = [("e4m3", 16), ("uint8", 64), ("uint6", 128), ("uint4", 64), ("e4m3", ROW)]
SEED = torch.tensor([5])
INFINITY = float("inf")


def round_trip(x, element, group, seed=None):
    codes, scales = encode_saved(x, element, group, seed, 3)
    return decode_saved(codes, scales, element, group, x.dtype)


def data(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * torch.randn(shape[0], *[1] * (len(shape) - 1),
                                                                   generator=generator).exp()).to(dtype)


def groups(x, group):
    """fp32 [rows, groups, group], what lacks filled with NaN."""
    group = group or x.shape[-1]
    flat = x.float().reshape(-1, x.shape[-1])
    return torch.nn.functional.pad(flat, (0, -flat.shape[1] % group), value=math.nan).reshape(len(flat), -1, group)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(64, 64), (3, 5, 40), (7, 1), (1, 129), (200,)])
@pytest.mark.parametrize("group", [16, ROW])
def test_e4m3_error_is_half_a_step(shape, dtype, group):
    x = data(*shape, dtype=dtype)
    given = groups(x, group)
    error = groups(round_trip(x.float(), "e4m3", group), group) - given
    amax = given.abs().nan_to_num().amax(-1, keepdim=True)
    # 3 bits of significand, below 2^-6 of the scale a step of 2^-9, and 2^-8 for a scale in bfloat16
    bound = given.abs() * (2.0**-4 + 2.0**-8) + amax / 448 * 2.0**-10 * 1.01
    assert (error.abs() <= bound)[~error.isnan()].all()
    assert error.isnan().sum() == given.isnan().sum()


SHAPES = [(64, 64), (3, 5, 70), (7, 1), (1, 129), (200,)]
PACKED = [(64, 64), (3, 5, 72), (7, 4), (1, 132), (200,)]


@pytest.mark.parametrize("seed", [None, SEED])
@pytest.mark.parametrize("element, group, shape", [
    *(("uint8", 64, shape) for shape in SHAPES),
    *((element, group, shape) for element, group in CODECS[2:4] for shape in PACKED)])
def test_integers_err_by_half_a_step_to_nearest_and_a_whole_one_at_random(element, group, shape, seed):
    x = data(*shape)
    error = groups(round_trip(x, element, group, seed), group) - groups(x, group)
    given = groups(x, group)
    span = given.nan_to_num(-INFINITY).amax(-1, keepdim=True) - given.nan_to_num(INFINITY).amin(-1, keepdim=True)
    bound = span / (2 ** BITS[element] - 1) * (0.5 if seed is None else 1.0) * 1.01 + given.abs() * 1e-6
    assert (error.abs() <= bound)[~error.isnan()].all()


@pytest.mark.parametrize("bits, shape", [(4, (16, 2)), (4, (3, 5, 6)), (6, (16, 4)), (6, (3, 5, 12)), (8, (7,))])
def test_packed_codes_come_back_and_take_their_bits(bits, shape):
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    packed = pack(codes, bits)
    assert packed.numel() * 8 == codes.numel() * bits and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits), codes)


def test_codes_lie_in_their_bytes_from_the_lowest_bit_on():
    assert pack(torch.tensor([1, 2], dtype=torch.uint8), 4).tolist() == [0x21]
    word = 1 | 2 << 6 | 3 << 12 | 4 << 18
    assert pack(torch.tensor([1, 2, 3, 4], dtype=torch.uint8), 6).tolist() == list(word.to_bytes(3, "little"))


def test_relative_error_of_gaussian_data():
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    errors = [((round_trip(x, e, g) - x).square().mean() / x.square().mean()).item() for e, g in CODECS]
    assert errors[0] == pytest.approx(5.0e-4, rel=0.05)  # (1/8)²/12 over the mean square of a significand in 1…2
    assert errors[1] == pytest.approx((4.75 / 255) ** 2 / 12, rel=0.1)  # the range of 64 is 4.75 deviations
    assert errors[2] == pytest.approx((5.4 / 63) ** 2 / 12, rel=0.1) and (
        errors[3] == pytest.approx((4.75 / 15) ** 2 / 12, rel=0.1))
    assert errors[4] == pytest.approx(6.9e-4, rel=0.05)


def test_e4m3_codes_are_those_of_another_implementation():
    x = data(32, 64)
    codes, scales = encode_saved(x, "e4m3", 16)
    exact = (x.double().reshape(32, 4, 16) / scales.double().unsqueeze(-1)).clamp(-448, 448).reshape(32, 64)
    expected = exact.numpy().astype(ml_dtypes.float8_e4m3fn).astype("float32")
    assert (codes.float().numpy() == expected).mean() > 0.999  # a quotient beside a tie may go the other way


def test_stochastic_rounding_is_unbiased_and_reproducible():
    x = torch.linspace(-1, 2, 64).repeat(4, 1) + torch.rand(4, 64, generator=torch.Generator().manual_seed(2)) / 300
    drawn = torch.stack([round_trip(x, "uint8", 64, torch.tensor([i])) for i in range(400)])
    step = 3.01 / 255
    assert ((drawn.mean(0) - x).abs() < 5 * step / 2 / 400**0.5 + step / 512).all()
    assert drawn.std(0).mean() > step / 5
    assert torch.equal(drawn[7], round_trip(x, "uint8", 64, torch.tensor([7])))
    assert not torch.equal(drawn[7], drawn[8])


@pytest.mark.parametrize("element, group", CODECS)
def test_zeros_constants_and_extremes(element, group):
    tiny, huge = torch.finfo(torch.float32).tiny, torch.finfo(torch.bfloat16).max / 4
    for value in (0.0, -3.5, tiny, huge, 2.0**-140):
        x = torch.full((2, 96), value)
        torch.testing.assert_close(round_trip(x, element, group), x, rtol=4e-3, atol=2.0**-130)
    assert not encode_saved(torch.zeros(1, 64), element, group)[0].float().any()


def test_zero_stays_zero_and_signs_stay_in_e4m3():
    x = data(32, 64)
    x[x.abs() < 0.2] = 0
    y = round_trip(x, "e4m3", 16)
    assert torch.equal(y == 0, x == 0) and torch.equal(y.sign(), x.sign())


@pytest.mark.parametrize("bad", [math.nan, INFINITY, -INFINITY])
@pytest.mark.parametrize("element, group", CODECS)
def test_nan_and_infinity_stay_visible_in_their_group_and_nowhere_else(element, group, bad):
    width = group or 32
    x = data(4, 4 * width)
    x[1, width + 3] = bad
    for seed in (None, SEED):
        y = round_trip(x, element, group, seed).reshape(4, 4, width)
        lost = torch.zeros(4, 4, dtype=torch.bool)
        lost[1, 1 if group else slice(None)] = True
        assert torch.equal(y.isfinite().all(-1), ~lost) and not y[1, 1].isfinite().any()


@pytest.mark.parametrize("element, group", CODECS)
def test_layout_of_codes_and_scales(element, group):
    x = data(3, 5, 72).transpose(0, 1)
    codes, scales = encode_saved(x, element, group)
    wide = -(-72 // group) if group else 1
    assert codes.shape == (5, 3, 72 * BITS[element] // 8) and codes.is_contiguous() and codes.element_size() == 1
    assert scales.shape == ((5, 3, wide) if element == "e4m3" else (5, 3, wide, 2))
    kept = codes.numel() + scales.numel() * scales.element_size()
    assert kept / x.numel() == pytest.approx(saved_bytes_per_element(element, group, 72))
    assert torch.equal(codes.view(torch.uint8), encode_saved(x.contiguous(), element, group)[0].view(torch.uint8))


@pytest.mark.parametrize("seed", [None, SEED])
@pytest.mark.parametrize("element, group", CODECS)
def test_the_ops_and_what_inductor_inlines_are_the_reference(element, group, seed):
    x = data(6, 5, 72, dtype=torch.bfloat16)
    expected = encode_saved(x, element, group, seed, 31)
    for encode in (saved_ops.ENCODE, saved_ops.encode_inlined):
        for a, b in zip(encode(x, element, group, seed, 31), expected, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    checks = ("test_schema", "test_faketensor")[element == "e4m3":]  # the first multiplies codes, which FP8 cannot
    torch.library.opcheck(saved_ops.ENCODE, (x, element, group, seed, 31), test_utils=checks)
    torch.library.opcheck(saved_ops.DECODE, (*expected, element, group, torch.bfloat16), test_utils=checks)


def test_its_random_bits_are_no_products():
    assert DRAW not in [int(draw) for draw in Draw] and DRAW < 16
