"""The quantisers for Blackwell in integer arithmetic, as on any GPU, bit for bit against the reference."""

import pytest
import torch
import triton_expected as expected

pytest.importorskip("triton")

from quartet.kernels import reference as ref  # noqa: E402
from quartet.kernels.spec import QuantSpec  # noqa: E402
from quartet.kernels.triton.quantize import blackwell  # noqa: E402
from quartet.kernels.triton.quantize.chain import Chain  # noqa: E402

pytestmark = pytest.mark.gpu
SHAPES = ((33, 33), (128, 128), (130, 4096), (17, 14336), (1, 32))
SEED = -8_765_432_109_876
# name: (quantiser, rotation, signed)
CHAINS = {
    "default": (expected.DEFAULT, expected.ROTATION, True),
    "guarded": (QuantSpec(rule="quest", mask=True), 32, False),
    "quest": (QuantSpec(rule="quest", sigma="rms", power="nearest", mask=True), 32, False),
    "stochastic": (QuantSpec(rule="headroom", rounding="stochastic"), 32, True),
    "rotation-128": (QuantSpec(rule="floor", mask=True), 128, True),
}


def made(function, *arguments):
    """By integer arithmetic, in new tensors that are full of ones, so that padding which nobody writes is seen."""
    torch.use_deterministic_algorithms(True)
    try:
        return function(*arguments, hardware=False)
    finally:
        torch.use_deterministic_algorithms(False)


def label(value):
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")


def chain(name, device, site=77):
    spec, rotation, signed = CHAINS[name]
    seed = torch.tensor(SEED, device=device)
    return Chain(spec, rotation, ref.random_signs(seed, 5, rotation) if signed else None, seed, site)


def same(lines):
    assert not lines, "\n".join(lines)


@pytest.mark.parametrize("shape", SHAPES, ids=label)
@pytest.mark.parametrize("name", CHAINS)
def test_quantize(name, shape, device):
    x, c = expected.data(*shape, torch.bfloat16, device), chain(name, device)
    for operand in (x, x.t()):
        got, wanted = made(blackwell.quantize, operand, c), expected.quantize(operand, c)
        same(expected.swizzled_difference("row", got, wanted, c.spec))
        assert got[2].shape == (operand.shape[0], got[0].shape[1] // 4 if c.spec.mask else 0)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=label)
@pytest.mark.parametrize("shape", SHAPES, ids=label)
@pytest.mark.parametrize("names", (("default", "default"), ("guarded", "stochastic"), ("stochastic", "stochastic")),
                         ids=" ".join)
def test_quantize_both(names, shape, dtype, device):
    x = expected.data(*shape, dtype, device)
    rows, columns = chain(names[0], device), chain(names[1], device, site=2**32 - 1)
    got = made(blackwell.quantize_both, x, rows, columns)
    same(expected.swizzled_difference("row", got[:2], expected.quantize(x, rows), rows.spec)
         + expected.swizzled_difference("column", got[2:], expected.quantize(x.t(), columns), columns.spec))


@pytest.mark.parametrize("shape", SHAPES, ids=label)
@pytest.mark.parametrize("name", CHAINS)
def test_requantize(name, shape, device):
    c, source = chain(name, device), chain("default", device)
    codes, scales, _ = expected.quantize(expected.data(*shape, torch.bfloat16, device), source)
    got = made(blackwell.requantize, codes, ref.swizzle_scales(scales), source.spec, c)
    same(expected.swizzled_difference("column", got, expected.requantize(codes, scales, source.spec, c), c.spec))


@pytest.mark.parametrize("name", ("default", "stochastic"))
def test_nan_and_infinity_stay_in_their_blocks(name, device):
    x, (spec, _, _) = expected.broken().to(device), CHAINS[name]
    c = Chain(spec, 0, None, torch.tensor(SEED, device=device), 3)
    got, wanted = made(blackwell.quantize, x, c), expected.quantize(x, c)
    assert (wanted[1] == 255).any() and (wanted[1] != 255).any()
    same(expected.swizzled_difference("row", got, wanted, spec))


@pytest.mark.parametrize("shape", ((0, 64), (3, 0)), ids=label)
def test_empty(shape, device):
    c = chain("default", device)
    got = made(blackwell.quantize, torch.empty(shape, device=device, dtype=torch.bfloat16), c)
    assert got[0].shape == (shape[0], shape[1] // 2) and not got[1].any()
