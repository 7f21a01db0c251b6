"""Our packing, scale layout and quantised product against CUTLASS's own, compiled for the CPU."""

import pytest
import torch
from cutlass_tools import MX_SPEC, host, needs_cutlass, random_operand

from quartet.kernels.reference import (
    e2m1_decode,
    quantize,
    swizzle_scales,
    swizzled_offset,
    swizzled_size,
    unpack_nibbles,
    unswizzle_scales,
)

pytestmark = needs_cutlass

SHAPES = ((1, 1), (1, 5), (31, 2), (32, 4), (33, 3), (127, 7), (128, 4), (129, 9), (255, 8), (300, 17), (512, 64))


@pytest.mark.parametrize("layout", (100, 103))
@pytest.mark.parametrize("operand", (0, 1))
@pytest.mark.parametrize("block", (16, 32))
def test_every_scale_lies_where_cutlass_looks_for_it(layout, operand, block, gen):
    ragged = [tuple(torch.randint(1, 400, (2,), generator=gen).tolist()) for _ in range(8)]
    for rows, cols in (*SHAPES, *ragged):
        theirs = host().offsets(layout, operand, block, rows, cols * block)
        index = torch.arange(1, rows * cols + 1).reshape(rows, cols)
        ours = swizzle_scales(index)
        assert ours.numel() == swizzled_size(rows, cols)
        assert torch.equal(ours[theirs.flatten()], index.flatten()), (rows, cols)
        assert torch.equal(unswizzle_scales(ours, rows, cols), index)


def test_the_offset_formula(gen):
    for rows, cols in SHAPES:
        theirs = host().offsets(100, 0, 32, rows, cols * 32)
        ours = [[swizzled_offset(row, col, cols) for col in range(cols)] for row in range(rows)]
        assert theirs.tolist() == ours


def test_every_packed_byte_decodes_alike():
    packed = torch.arange(256, dtype=torch.uint8).reshape(4, 64)
    assert torch.equal(host().decode(packed), e2m1_decode(unpack_nibbles(packed)))


@pytest.mark.parametrize("kind", ("mxf4", "nvf4", "mxf8"))
@pytest.mark.parametrize("m,n,k", ((128, 128, 256), (1, 8, 32), (17, 40, 96), (130, 136, 544), (64, 300, 1024)))
def test_the_quantised_product(kind, m, n, k, gen):
    a, a_scales, a_values = random_operand(kind, m, k, gen)
    b, b_scales, b_values = random_operand(kind, n, k, gen)
    found = host().gemm(kind, a, swizzle_scales(a_scales), b, swizzle_scales(b_scales), 16 / 9)
    exact = a_values @ b_values.t() * (16 / 9)
    magnitude = a_values.abs() @ b_values.abs().t() * (16 / 9)
    assert exact.abs().max() > 0
    assert ((found.double() - exact).abs() <= 1e-6 * magnitude).all()


@pytest.mark.parametrize("kind", ("mxf4", "mxf8"))
def test_a_nan_scale_stays_visible(kind, gen):
    spec = MX_SPEC[kind]
    x, y = torch.randn(40, 128, generator=gen), torch.randn(24, 128, generator=gen)
    x[3, 70] = torch.inf
    (a, a_scales, _), (b, b_scales, _) = quantize(x, spec), quantize(y, spec)
    found = host().gemm(kind, a, swizzle_scales(a_scales), b, swizzle_scales(b_scales), 1.0)
    assert found[3].isnan().all() and not found[torch.arange(40) != 3].isnan().any()
