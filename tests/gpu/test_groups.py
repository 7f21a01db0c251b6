"""FP8 rows and folds of MXFP4 rows with scales of groups, every bit as the reference's, and many matrices at once."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

import group_cases as cases  # noqa: E402
import triton_expected as expected  # noqa: E402

from quartet.kernels import reference as ref  # noqa: E402
from quartet.kernels.spec import QuantSpec  # noqa: E402
from quartet.kernels.triton.quantize import groups, ops  # noqa: E402
from quartet.lowering.ir.ops import fp8 as fp8_ops  # noqa: E402

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# rows, tokens, groups, what ends are multiples of, tokens behind the last
SHAPES = ((33, 33, 1, 1, 0), (64, 4096, 64, 16, 0), (130, 1000, 5, 1, 7), (1000, 4112, 8, 16, 300),
          (4100, 260, 300, 1, 0))
LARGE = (2048, 16384, 64, 16, 500)


def check(x, spec, ends):
    lines = cases.differences(x, spec, ends.to(x.device))
    assert not lines, "\n".join(lines)


@pytest.mark.parametrize("name", cases.cases())
def test_cases_of_the_interpreter(name):
    lines = cases.cases()[name].differences("cuda")
    assert not lines, "\n".join(lines)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape[:3])))
def test_shapes(shape, dtype, layout):
    rows, tokens, count, multiple, tail = shape
    x = cases.LAYOUTS[layout](expected.data(rows, tokens, dtype, "cuda"))
    check(x, cases.E4M3, cases.cut(tokens, count, multiple, tail))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", cases.SPECS.values(), ids=cases.SPECS)
def test_large(spec, dtype):
    rows, tokens, *cut = LARGE
    check(cases.beside(expected.data(rows, tokens, dtype, "cuda")), spec, cases.cut(tokens, *cut))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", cases.SPECS.values(), ids=cases.SPECS)
@pytest.mark.parametrize("tokens", (1008, 1003))
def test_special_numbers(tokens, spec, dtype):
    ends = cases.cut(tokens, 6, multiple=1)
    check(cases.beside(cases.special(200, tokens, ends, dtype).cuda()), spec, ends)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_every_half_precision_number(dtype):
    """Each in a row of its own, beside a number that sets another scale for each group."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32, device="cuda").to(torch.int16)
    x = bits.view(dtype)[:, None].repeat(1, 32)
    x[:, 16:31] *= torch.linspace(0.01, 3, 15, device="cuda").to(dtype)
    for spec in cases.SPECS.values():
        check(cases.beside(x), spec, torch.tensor([8, 16, 32], dtype=torch.int32))


def test_it_never_waits_for_the_device_and_gives_the_same_again():
    x = cases.beside(expected.data(512, 4096, torch.bfloat16, "cuda"))
    ends = cases.cut(4096, 16).cuda()
    first = groups.quantize_groups(x, cases.E4M3, ends)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = groups.quantize_groups(x, cases.E4M3, ends)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(first, again, strict=True):
        assert not expected.difference("again", other, one)


def test_a_recorded_graph_follows_the_ends():
    x = cases.beside(expected.data(256, 2048, torch.bfloat16, "cuda"))
    ends = cases.cut(2048, 8).cuda()
    groups.quantize_groups(x, cases.E4M3, ends)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = groups.quantize_groups(x, cases.E4M3, ends)
    ends.copy_(torch.tensor([16, 16, 512, 520, 520, 1024, 1777, 2000], dtype=torch.int32))
    graph.replay()
    for made, wanted in zip(got, cases.grouped.quantize_groups(x, cases.E4M3, ends), strict=True):
        assert not expected.difference("replayed", made, wanted)


@pytest.mark.parametrize("block", (32, 64, 128))
def test_fold(block):
    """Every group lies twenty powers of two below the one before it."""
    ends, spec = (512, 512, 640, 1536, 1920), QuantSpec(block=block)
    x = expected.data(300, 2048, torch.float32, "cuda")
    for start, end in zip(ends, (*ends[1:], 2048), strict=True):
        x[:, start:] *= 2.0**-20 if end > start else 1
    codes, scales, _ = ref.quantize(x, spec)
    folded = ops.fold(codes, scales, spec, torch.tensor(ends, dtype=torch.int32, device="cuda"))
    lines = expected.fold_of_groups_difference(folded, codes, scales, spec, ends)
    assert not lines, "\n".join(lines)


def test_more_matrices_than_one_product_takes():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the grouped FP8 product needs compute capability 9.0")
    count = 2 * fp8_ops.MOST_GROUPS + 5
    a, b = (torch.randn(count, n, 64, device="cuda").to(torch.float8_e4m3fn) for n in (48, 32))
    scales = torch.rand(count, 48, device="cuda") + 0.5, torch.rand(count, 32, device="cuda") + 0.5
    got = torch.ops.quartet.fp8_bmm(a, b, *scales, torch.bfloat16, True)
    wanted = a.float() @ b.float().mT * scales[0].unsqueeze(2) * scales[1].unsqueeze(1)
    torch.testing.assert_close(got.float(), wanted, rtol=2**-7, atol=1e-2)
