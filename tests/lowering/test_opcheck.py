"""PyTorch's own check of the ops around block-scaled products: true schemas, and fakes with the real shapes."""

import pytest
import torch

from quartet.cli.selftest.products import Operand
from quartet.kernels import reference
from quartet.kernels.reference.formats.nvfp4 import tensor_scales
from quartet.kernels.spec import QuantSpec
from quartet.lowering.ir.ops import fused as cuda_ops
from quartet.lowering.targets.blackwell import block_scaled_ops as ops
from quartet.lowering.targets.blackwell import ops as blackwell_ops

SIZES = ((256, 64, 128), (33, 16, 384), (1, 48, 256))  # M, N, K
KINDS = {"mxf4": ops.SPECS["mxf4"], "nvf4": ops.SPECS["nvf4"], "mxf8": ops.SPECS["mxf8"]}


def operands(m, n, k, spec):
    torch.manual_seed(0)
    return Operand.of(torch.randn(m, k), spec), Operand.of(torch.randn(n, k), spec)


def check(op, *arguments):
    """The schema's check multiplies tensors, which a CPU cannot in FP8: it gets bytes, which these ops take too."""
    torch.library.opcheck(op, arguments, test_utils="test_faketensor")
    plain = [x.view(torch.uint8) if isinstance(x, torch.Tensor) and x.dtype is torch.float8_e4m3fn else x
             for x in arguments]
    torch.library.opcheck(op, plain, test_utils="test_schema")


@pytest.mark.parametrize("tile", [1, 16])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(128, 4), (130, 6), (1, 1), (0, 4)], ids=str)
def test_swizzle_scales(shape, dtype, tile):
    scales = torch.rand(shape).mul(400).to(dtype)
    check(ops.SWIZZLE, scales, tile)
    check(ops.SWIZZLE, torch.rand(shape[::-1]).mul(400).to(dtype).t(), tile)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_block_scaled_mm(size, kind, dtype):
    a, b = operands(*size, KINDS[kind])
    for alpha in (None, torch.tensor([0.5])):
        check(ops.MM, a.codes, a.swizzled, b.codes, b.swizzled, kind, 1.75, dtype, alpha, True)


@pytest.mark.parametrize("formats", [("nvf4", "nvf4"), ("mxf8", "mxf8"), ("1x128", "128x128"), ("1x128", "1x128")],
                         ids=" ".join)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_library_scaled_mm(size, formats):
    torch.manual_seed(0)
    m, n, k = size
    a, b = (Operand.of(torch.randn(rows, k), ops.SPECS[format]) for rows, format in zip((m, n), formats, strict=True))
    scales = [x.turned if x.spec.scale == "fp32" else x.swizzled for x in (a, b)]
    for alpha in (None, torch.tensor([0.5])):
        check(ops.LIBRARY_MM, a.codes, scales[0], b.codes, scales[1], *formats, torch.bfloat16, alpha)


@pytest.mark.parametrize("spec", ["e2m1/32 e8m0 quest(rms,nearest) nearest mask", "e2m1/32 e8m0 headroom stochastic",
                                  "e2m1/16 e4m3 amax nearest", "e2m1/16x16 e4m3 amax nearest"])
@pytest.mark.parametrize("size", [(64, 256), (33, 71)], ids=str)
def test_quantisers_for_blackwell(size, spec):
    """Those that compute on a CPU too."""
    x, q, seed = torch.randn(size), QuantSpec.parse(spec), torch.tensor(7)
    rotation = 32 if q.scale == "e8m0" else 0
    encode = tensor_scales(reference.largest_magnitude(x), q)[0] if q.takes_amax else None
    chain = rotation, None, spec, seed if q.stochastic else None, 3, encode
    check(blackwell_ops.QUANTIZE, x, *chain, None, None, True)
    check(blackwell_ops.QUANTIZE_BOTH, x, *chain, *chain, False)
    check(blackwell_ops.UNSWIZZLE, torch.zeros(512, dtype=torch.uint8), 33, 3)
    check(cuda_ops.ROTATED_AMAX, x, 32, None)


def test_a_wrong_fake_is_seen():
    """The check is one."""
    library = torch.library.Library("quartet_opcheck_test", "DEF")
    library.define("swizzle(Tensor scales) -> Tensor")
    library.impl("swizzle", lambda scales: reference.swizzle_scales(scales), "CPU")
    torch.library.register_fake("quartet_opcheck_test::swizzle", lambda scales: scales.new_empty(scales.numel()),
                                lib=library)
    codes, scales, _ = reference.quantize(torch.randn(5, 64), QuantSpec())
    with pytest.raises(Exception, match="test_faketensor failed"):
        check(torch.ops.quartet_opcheck_test.swizzle.default, scales)
