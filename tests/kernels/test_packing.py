"""Nibbles, bit masks and the scale layout of Blackwell's tensor cores."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quartet.kernels.reference import (
    apply_mask,
    pack_bits,
    pack_nibbles,
    swizzle_scales,
    unpack_bits,
    unpack_nibbles,
    unswizzle_scales,
)


def test_even_elements_are_in_the_low_nibble():
    codes = torch.tensor([[1, 2, 15, 0], [0, 9, 7, 8]], dtype=torch.uint8)
    assert pack_nibbles(codes).tolist() == [[0x21, 0x0F], [0x90, 0x87]]


@given(st.lists(st.integers(0, 255), min_size=1, max_size=64))
@settings(max_examples=50, deadline=None)
def test_nibbles_and_bits_invert(values):
    packed = torch.tensor([values], dtype=torch.uint8)
    assert torch.equal(pack_nibbles(unpack_nibbles(packed)), packed)
    assert torch.equal(pack_bits(unpack_bits(packed)), packed)


def test_bits_are_least_significant_first(gen):
    mask = torch.rand(5, 64, generator=gen) < 0.5
    expected = torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little"))
    assert torch.equal(pack_bits(mask), expected)
    assert torch.equal(unpack_bits(expected), mask)


def test_apply_mask_keeps_and_drops(gen):
    x = torch.randn(3, 16, generator=gen, dtype=torch.bfloat16)
    x[0, 1] = torch.nan
    mask = torch.rand(3, 16, generator=gen) < 0.5
    mask[0, 1] = False
    y = apply_mask(x, pack_bits(mask))
    assert y.dtype == x.dtype
    assert torch.equal(y[mask], x[mask]) and not y[~mask].any()


@pytest.mark.parametrize("rows,cols", ((128, 4), (256, 8), (384, 12)))
def test_swizzle_golden(golden, rows, cols):
    index = torch.arange(rows * cols, dtype=torch.int32).reshape(rows, cols)
    assert torch.equal(swizzle_scales(index), golden("scale_swizzle")[f"perm_{rows}x{cols}"])


@pytest.mark.parametrize("rows,cols", ((1, 1), (128, 4), (129, 5), (40, 3), (300, 17)))
def test_swizzle_formula_and_inverse(rows, cols, gen):
    scales = torch.randint(1, 256, (rows, cols), generator=gen, dtype=torch.uint8)
    flat = swizzle_scales(scales)
    col_tiles = -(-cols // 4)
    expected = torch.zeros(-(-rows // 128) * col_tiles * 512, dtype=torch.uint8)
    for r in range(rows):
        for c in range(cols):
            offset = ((r // 128) * col_tiles + c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4
            expected[offset] = scales[r, c]
    assert torch.equal(flat, expected)
    assert torch.equal(unswizzle_scales(flat, rows, cols), scales)


def test_swizzle_torchao(gen):
    utils = pytest.importorskip("torchao.prototype.mx_formats.utils", reason="torchao is the oracle")
    scales = torch.randint(0, 256, (200, 10), generator=gen, dtype=torch.uint8)
    assert torch.equal(swizzle_scales(scales), utils.to_blocked(scales).flatten())
