"""PyTorch's own check of the graph ops over Triton kernels: schemas tell the truth, and fakes have the real shapes."""

import pytest
import torch
import triton_expected as expected

pytest.importorskip("triton")

from quartet.kernels import reference as ref  # noqa: E402
from quartet.kernels.reference.formats.nvfp4 import tensor_scales  # noqa: E402
from quartet.kernels.reference.quantize import largest_magnitude  # noqa: E402
from quartet.kernels.spec import QuantSpec  # noqa: E402
from quartet.lowering.ir.ops import fused as cuda_ops  # noqa: E402
from quartet.lowering.targets.blackwell import ops as blackwell_ops

pytestmark = pytest.mark.gpu
FORWARD, BACKWARD = expected.DEFAULT, QuantSpec(rule="headroom", rounding="stochastic")
TWO_LEVEL = [QuantSpec.parse(f"e2m1/{block} e4m3 {rule}") for block, rule in (
    (16, "amax nearest"), (16, "amax stochastic"), (16, "four_six nearest"), (16, "eden stochastic"),
    ("16x16", "amax nearest"))]
SIZES = ((64, 256), (130, 96), (33, 71))


def check(op, *arguments):
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def chain(spec, device):
    """The arguments ``CHAIN`` of an op."""
    seed = torch.tensor(77, device=device)
    signs = ref.random_signs(seed, 5, expected.ROTATION) if spec.stochastic else expected.SIGNS.to(device)
    return expected.ROTATION, signs, str(spec), seed if spec.stochastic else None, 7, None


def two_level(x, spec):
    """The same of E4M3 scales, with the multiplier of the tensor."""
    seed = torch.tensor(77, device=x.device) if spec.stochastic else None
    return 0, None, str(spec), seed, 7, tensor_scales(largest_magnitude(x), spec)[0]


def packed(rows, cols, device):
    return ref.quantize(expected.data(rows, -(-cols // 32) * 32, torch.bfloat16, device), FORWARD)[:2]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("spec", (FORWARD, BACKWARD), ids=str)
def test_quantisers(spec, size, device):
    x, c = expected.data(*size, torch.bfloat16, device), chain(spec, device)
    for how in ((True, True), (True, False), (False, True)):
        check(cuda_ops.QUANTIZE, x, *c, *how)
    check(cuda_ops.QUANTIZE, x, *c, True, True, torch.nn.Parameter(x.clone()))
    check(cuda_ops.QUANTIZE_BOTH, x, *c, *chain(BACKWARD, device))
    for hardware in (True, False):
        check(blackwell_ops.QUANTIZE, x, *c, None, None, hardware)
        check(blackwell_ops.QUANTIZE_BOTH, x, *c, *chain(BACKWARD, device), hardware)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("spec", TWO_LEVEL, ids=str)
def test_quantisers_of_two_levels(spec, size, device):
    x = expected.data(*size, torch.bfloat16, device)
    check(cuda_ops.QUANTIZE, x, *two_level(x, spec), True, False)
    for hardware in (True, False):
        check(blackwell_ops.QUANTIZE, x, *two_level(x, spec), None, None, hardware)
    check(cuda_ops.ROTATED_AMAX, x, 16, None)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("spec", (FORWARD, BACKWARD), ids=str)
def test_requantisers(spec, size, device):
    codes, scales = packed(*size, device)
    for how in ((True, True), (True, False), (False, True)):
        check(cuda_ops.REQUANTIZE, codes, scales, str(FORWARD), *chain(spec, device), *how)
    for hardware in (True, False):
        check(blackwell_ops.REQUANTIZE, codes, ref.swizzle_scales(scales), str(FORWARD), *chain(spec, device), hardware)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_what_reads_packed_codes(size, device):
    codes, scales = packed(*size, device)
    check(cuda_ops.FOLD, codes, scales, str(FORWARD))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        check(cuda_ops.DEQUANTIZE, codes, scales, str(FORWARD), dtype)
    check(blackwell_ops.UNSWIZZLE, ref.swizzle_scales(scales), *scales.shape)


@pytest.mark.parametrize("masked", (True, False))
def test_unrotate(masked, device):
    x = expected.data(33, 96, torch.bfloat16, device)
    mask = torch.randint(0, 256, (33, 12), dtype=torch.uint8, device=device) if masked else None
    for cols in (96, 71):
        check(cuda_ops.UNROTATE, x, mask, 32, None, 4 / 3, cols, torch.bfloat16)


def test_dot(device):
    if torch.cuda.get_device_capability(device) < (10, 0):
        pytest.skip("the FP4 product needs compute capability 10.0")
    (a, a_scales), (b, b_scales) = packed(130, 256, device), packed(64, 256, device)
    check(blackwell_ops.DOT, a, ref.swizzle_scales(a_scales), b, ref.swizzle_scales(b_scales), 1.75, torch.bfloat16)
