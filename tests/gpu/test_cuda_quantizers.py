"""The CUDA C++ quantisers on a GPU: what the reference allows of sums in another order, on the same GPU."""

import pytest
import torch
import triton_expected as expected

pytest.importorskip("triton")

from quartet.kernels import reference as ref  # noqa: E402
from quartet.kernels.cuda import ops  # noqa: E402
from quartet.kernels.reference import tolerance  # noqa: E402
from quartet.kernels.spec import QuantSpec  # noqa: E402
from quartet.kernels.triton.quantize.chain import Chain  # noqa: E402
from quartet.lowering.ir.ops import fused  # noqa: E402
from quartet.runtime.devices import Target  # noqa: E402

pytestmark = pytest.mark.gpu

SEED = -8_765_432_109_876
SHAPES = ((1, 32), (33, 40), (100, 8), (130, 4096), (17, 14336), (2000, 1000), (4096, 5120))
KINDS = ("normal", "spread", "broken", "zeros", "equal", "huge", "tiny")
EVEN = QuantSpec(rule="even")
FEW_DIFFER = 2.0**-16  # of the codes, on data without ties; measured: 60 of 2^27


@pytest.fixture(autouse=True)
def runs_here(device):
    reason = fused.hopper(Target.of(device))
    if reason is not None:
        pytest.skip(reason)


def data(kind: str, rows: int, cols: int, device) -> torch.Tensor:
    gen = torch.Generator().manual_seed(rows + cols)
    x = torch.randn(rows, cols, generator=gen)
    if kind == "spread":
        x *= 2.0 ** torch.randint(-12, 13, x.shape, generator=gen)
    elif kind == "broken":
        x[rows // 3, 3], x[rows // 2, cols // 2], x[-1, -1] = float("nan"), float("inf"), float("-inf")
    elif kind == "zeros":
        x[: rows // 2, : cols // 2], x[rows // 2], x[:, cols // 3] = 0, 0, -0.0
    elif kind == "equal":
        x = torch.randint(-8, 9, x.shape, generator=gen).float()
    elif kind == "huge":
        x *= 2.0 ** torch.randint(90, 127, (rows, 1), generator=gen)
    elif kind == "tiny":
        x *= 2.0 ** torch.randint(-133, -100, (rows, 1), generator=gen)
    return x.to(device, torch.bfloat16)


def chain(device, site: int, signed: bool = True) -> Chain:
    seed = torch.tensor(SEED, device=device)
    return Chain(ops.STOCHASTIC, 32, ref.random_signs(seed, site, 32) if signed else None, seed, site)


def judge(x, c, codes, scales) -> int:
    """How many codes differ from the reference's, none of which may lie beyond the bound."""
    allowed = tolerance.allowed(x, c.rotation, c.signs, c.spec, c.seed, c.site, codes, scales)
    assert allowed.all(), f"{int((~allowed).sum())} of {allowed.numel()} beyond the bound"
    wanted, wanted_scales, _ = expected.quantize(x, c)
    values, right = (ref.e2m1_decode(ref.unpack_nibbles(packed)) for packed in (codes, wanted))
    return int(((values != right) & expected.finite(wanted_scales, 32)).sum())


def both(x, rows, columns):
    return ops.quantize_both(x, rows, columns, counter(x.device))


def counter(device):
    return torch.zeros(1, dtype=torch.int64, device=device)


def judge_folded(x, c, values, row_scales) -> int:
    """The same of E4M3 rows: how many differ from the fold of the reference's codes, where that is exact."""
    codes, scales, _ = expected.quantize(x, c)
    usual = ((scales > 1) & (scales < 234) | (scales == 255)).all(1)  # no block near the end of fp32's numbers
    codes, scales, values, row_scales = (t[usual] for t in (codes, scales, values.view(torch.uint8), row_scales))
    values = values.view(torch.float8_e4m3fn)
    wanted, wanted_scales, _ = expected.fold(codes, scales, c.spec)
    finite = expected.finite(scales, 32)
    assert torch.equal(values.float().isnan(), ~finite) and torch.equal(row_scales, wanted_scales)
    off = (values.float() * row_scales - wanted.float() * wanted_scales)[finite]
    step = ref.e8m0_decode(scales).repeat_interleave(32, 1)[finite]
    assert (off.abs() <= 2 * step).all()  # a neighbouring code at most
    return int((off != 0).sum())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_both_axes(kind, shape, device):
    x = data(kind, *shape, device)
    rows, columns = chain(device, 7), chain(device, 2**32 - 1, signed=kind != "equal")
    assert ops.declines_both(x, rows, columns) is None
    values, row_scales, turned, turned_scales = both(x, rows, columns)
    differing = judge(x.t(), columns, turned, turned_scales) + judge_folded(x, rows, values, row_scales)
    assert kind in ("equal", "huge", "tiny") or differing <= 2 * x.numel() * FEW_DIFFER


@pytest.mark.parametrize(("shape", "matrices"), [(shape, 1) for shape in SHAPES if shape[1] % 32 == 0]
                         + [((40, 320), 3), ((256, 512), 8)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_requantize(kind, shape, matrices, device):
    x = data(kind, matrices * shape[0], shape[1], device)
    codes, scales, _ = expected.quantize(x, Chain(EVEN, 32))
    c = chain(device, 77)
    assert ops.declines_requantize(codes, scales, EVEN, c, matrices) is None
    count = counter(device)
    *made, folded, row_scales = ops.requantize(codes, scales, c, count, packed=True, folded=True, matrices=matrices)
    assert not expected.fold_difference("turned", (folded, row_scales), *made, c.spec, int(count))
    values = ref.dequantize(codes, scales, EVEN).reshape(matrices, shape[0], -1).mT.flatten(0, 1)
    differing = judge(values, c, *made)
    assert kind in ("equal", "huge", "tiny") or differing <= values.numel() * FEW_DIFFER


def test_rows_that_lie_apart(device):
    x = data("normal", 70, 96, device)[:, 8:88]
    rows, columns = chain(device, 7), chain(device, 8)
    values, row_scales, turned, turned_scales = both(x, rows, columns)
    judge_folded(x, rows, values, row_scales)
    judge(x.t(), columns, turned, turned_scales)


def test_what_the_kernels_decline_is_tritons(device):
    """A shape, a type and a quantiser that the CUDA kernels do not take."""
    seed = torch.tensor(SEED, device=device)
    stochastic = (32, None, str(ops.STOCHASTIC), seed, 5, None)
    nearest = (32, None, "e2m1/32 e8m0 headroom nearest", None, 5, None)
    narrow, single = data("normal", 64, 33, device), data("normal", 64, 64, device).float()
    whole = data("normal", 64, 64, device)
    for x, one, other in ((narrow, stochastic, stochastic), (single, stochastic, stochastic),
                          (whole, stochastic, nearest)):
        got = fused.cuda_quantize_both(x, *one, *other)
        wanted = fused.cuda_quantize_both.reference(x, *one, *other)
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(got, wanted, strict=True))


def test_repeats_have_the_same_bits(device):
    x = data("normal", 640, 1024, device)
    first, second = (both(x, chain(device, 7), chain(device, 8)) for _ in range(2))
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(first, second, strict=True))
