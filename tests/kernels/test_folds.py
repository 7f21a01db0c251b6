"""NVFP4 is exact in bf16 and MXFP4 in E4M3 with a scale a row: every code under every scale."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import triton_expected as expected  # noqa: E402

from quartet.kernels import reference as ref  # noqa: E402
from quartet.kernels.reference.formats.packing import pack_nibbles, unpack_nibbles  # noqa: E402
from quartet.kernels.reference.quantize import inner  # noqa: E402
from quartet.kernels.spec import QuantSpec  # noqa: E402

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
CODES = torch.arange(16, dtype=torch.uint8)
VALUES = torch.tensor(E2M1 + tuple(-x for x in E2M1), dtype=torch.float64)


def bits(x):
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


def e4m3(byte):
    """Value of an E4M3 byte by its definition: None for NaN."""
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    if (exponent, mantissa) == (15, 7):
        return float("nan")
    magnitude = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -magnitude if sign else magnitude


def test_nvfp4_is_exact_in_bf16():
    spec = QuantSpec.parse("e2m1/16 e4m3 amax nearest")
    assert spec.exact_in_bf16
    codes = pack_nibbles(CODES.expand(256, 16).contiguous())
    scales = torch.arange(256, dtype=torch.uint8).unsqueeze(1).view(torch.float8_e4m3fn)
    wanted = torch.tensor([[e4m3(byte)] for byte in range(256)], dtype=torch.float64) * VALUES
    got = inner(codes, scales, spec, torch.bfloat16, unpack_nibbles)
    nan = wanted.isnan()
    assert nan.any(1).nonzero().flatten().tolist() == [0x7F, 0xFF] and torch.equal(got.isnan(), nan)
    assert torch.equal(got.double()[~nan], wanted[~nan])
    signs = torch.signbit(wanted) == torch.signbit(got.double())
    assert signs[~nan].all()
    single = inner(codes, scales, spec, torch.float32, unpack_nibbles)
    assert torch.equal(bits(got.float())[~nan], bits(single)[~nan])


def test_bf16_has_no_bit_to_spare_for_it():
    """The check is one: with one significant bit less some products are not exact."""
    scales = torch.tensor([e4m3(byte) for byte in range(1, 0x7F)], dtype=torch.float64)
    products = (scales.unsqueeze(1) * VALUES[1:8]).flatten()
    fraction = products.frexp().mantissa * 2.0**5
    assert (fraction != fraction.round()).any()
    assert torch.equal(products.bfloat16().double(), products)


def test_mxfp4_is_exact_in_e4m3_where_blocks_span_fifteen_powers():
    """Every largest byte of a row, with blocks up to fourteen powers below it, by the fold that the kernels equal."""
    codes, scales = expected.every_fold()
    assert codes.shape == (255, 15 * 16) and scales.shape == (255, 15)
    spec = QuantSpec()
    values, row_scales, rounded = expected.fold(codes, scales, spec)
    assert rounded == 0
    exact = expected.every_value(codes, scales)
    assert torch.equal(values.double() * row_scales.double(), exact) and exact.isfinite().all()
    assert (scales[:, :1].int() - scales.int()).unique().tolist() == list(range(15))


def test_a_block_further_down_is_not_and_is_counted():
    codes, scales = expected.every_fold(span=16)
    values, row_scales, rounded = expected.fold(codes, scales, QuantSpec())
    wrong = values.double() * row_scales.double() != expected.every_value(codes, scales)
    assert rounded == wrong.reshape(255, 16, 32).any(-1).sum() > 0
    assert not wrong[:, : 15 * 32].any()


@pytest.mark.parametrize("span", [15, 16])
def test_the_table_of_the_kernels_is_exact_there_and_only_there(span):
    fold = pytest.importorskip("quartet.kernels.triton.quantize.fold")
    table = fold.table(torch.device("cpu")).view(torch.uint8).view(torch.float8_e4m3fn).double()
    rows = torch.arange(fold.TOP - span + 1, fold.TOP + 1)
    wanted = VALUES[:8] * 2.0 ** rows.unsqueeze(1).double()
    assert torch.equal(table[rows + 24], wanted) is (span == 15)
    assert table[fold.NAN_ROW].isnan().all() and len(table) == fold.NAN_ROW + 1


def test_codes_are_read_as_defined():
    assert torch.equal(ref.e2m1_decode(CODES).double(), VALUES)
