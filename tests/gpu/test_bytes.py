"""FP8 in blocks and tiles, FP8 and INT8 rows on the device: every bit as the reference's on the same device."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

import byte_cases as cases  # noqa: E402
import triton_expected as expected  # noqa: E402

from quartet.kernels import reference as ref  # noqa: E402
from quartet.kernels.spec import QuantSpec  # noqa: E402
from quartet.kernels.triton.bytes import rows, tensors, tiles  # noqa: E402
from quartet.lowering.ir.ops import fp8, fused  # noqa: E402
from quartet.runtime.replay.library import LAUNCHER  # noqa: E402

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ((33, 33), (128, 4096), (130, 4097), (17, 14336), (1000, 1030))
PAIRS = tuple((one, other) for one in cases.BLOCKS[:4] for other in cases.BLOCKS[:4])
LAST = 48  # rows of a tensor beyond 2^31 elements that are compared


def same(lines):
    assert not lines, "\n".join(lines)


@pytest.mark.parametrize("name", cases.cases())
def test_cases_of_the_interpreter(name):
    same(cases.cases()[name].differences("cuda"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spec", (*cases.BLOCKS, *cases.ROWS), ids=str)
def test_shapes(spec, shape, dtype, device):
    x = expected.data(*shape, dtype, device)
    same([line for given in (x, x.t(), x[1:, 3:]) for line in cases.check(given, spec)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", (*cases.BLOCKS, *cases.ROWS), ids=str)
def test_sizes_of_one(spec, dtype, device):
    """Triton makes constants of them, so that the compiler knows every number that pads a block."""
    for shape in ((1, 1), (1, 4096), (4096, 1)):
        x = expected.data(*shape, dtype, device)
        same(cases.check(x, spec) + cases.check(x.t(), spec)
             + (cases.check_both(x, spec, cases.BLOCKS[2]) if spec.blocked else []))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("specs", PAIRS, ids=str)
def test_both_axes(specs, shape, dtype, device):
    same(cases.check_both(expected.data(*shape, dtype, device), *specs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", cases.TENSORS, ids=str)
def test_several_tensors(spec, dtype, device):
    given = [expected.data(*shape, dtype, device) for shape in ((8192, 512), (128, 4096), (132, 4097), (16, 14336),
                                                                (1000, 1030), (4, 4), (20000, 64), (256, 256))]
    same(cases.check_tensors(given, spec))
    same(cases.check_tensors([*given, given[0][4:, 3:], given[1].t(), cases.broken(200, 1030, dtype).to(device)], spec))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", (*cases.BLOCKS, *cases.ROWS), ids=str)
def test_special_numbers(spec, dtype, device):
    for x in (cases.broken(200, 1030, dtype).to(device), cases.edges(600).to(device, dtype)):
        same(cases.check(x, spec) + cases.check(x.t(), spec))
        if spec.blocked:
            same(cases.check_both(x, spec, cases.BLOCKS[0]) + cases.check_both(x, cases.BLOCKS[1], spec))


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("spec", (*cases.BLOCKS, *cases.ROWS), ids=str)
def test_every_half_precision_number(spec, dtype, device):
    """Beside one that sets the scale: each is the largest of a block, and lies below others."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32, device=device).to(torch.int16).view(dtype)
    finite = bits[bits.isfinite()]
    same(cases.check(finite[: len(finite) // 256 * 256].reshape(-1, 256), spec) + cases.check(bits[:, None], spec)
         + cases.check(torch.stack((bits, bits.roll(1), bits.roll(777)), 1), spec))


@pytest.mark.parametrize("spec", cases.RECIPES, ids=str)
def test_random_data(spec, device):
    """2^24 elements spread over 2^±20, each part under a scale of its own."""
    torch.manual_seed(5)
    x = torch.randn(4096, 4096, device=device) * torch.exp2(torch.randint(-20, 20, (4096, 32), device=device).float()
                                                            ).repeat_interleave(128, 1)
    for dtype in DTYPES:
        same(cases.check(x.to(dtype), spec))
        if spec.blocked:
            same(cases.check_both(x.to(dtype), spec, spec))


@pytest.fixture(scope="module")
def large():
    device = torch.device("cuda", torch.cuda.current_device())
    if torch.cuda.get_device_properties(device).total_memory < 48 << 30:
        pytest.skip("needs 48 GiB")
    x = torch.ones(2**19 + 128, 4096, dtype=torch.bfloat16, device=device)
    assert x.numel() > 2**31
    x[-LAST:] = expected.data(LAST, 4096, torch.bfloat16, device)
    return x


@pytest.mark.parametrize("spec", cases.BLOCKS[:2], ids=str)
def test_blocks_beyond_2_31_elements(spec, large):
    codes, scales, turned, turned_scales = tiles.quantize_both(large, spec, spec)
    wanted, tail = cases.ref.quantize(large[-LAST:], spec), large[-128:].t()
    same(cases.difference("codes", codes[-LAST:], wanted[0]) + cases.difference("scales", scales[-LAST:], wanted[1]))
    wanted = cases.ref.quantize(tail, spec)
    same(cases.difference("columns", turned[:, -128:].contiguous(), wanted[0])
         + cases.difference("their scales", turned_scales[:, -128 // spec.block:].contiguous(), wanted[1].contiguous()))


@pytest.mark.parametrize("spec", cases.ROWS[:2], ids=str)
def test_rows_beyond_2_31_elements(spec, large):
    codes, scales = rows.quantize(large, spec)
    wanted = cases.ref.quantize(large[-LAST:], spec)
    same(cases.difference("codes", codes[-LAST:], wanted[0]) + cases.difference("scales", scales[-LAST:], wanted[1]))


def test_tensors_beyond_2_31_elements(large):
    spec = cases.TENSORS[0]
    largest = tensors.largest_magnitudes([large[-LAST:], large])
    assert torch.equal(largest[1], cases.ref.largest_magnitude(large))
    multipliers, _ = tensors.scales_of([large.abs().amax(1), large[-LAST:].abs().amax(1)], spec)
    codes, tail, turned, _ = tensors.cast([large, large[-LAST:]], multipliers, torch.float8_e4m3fn, plain=True,
                                          turned=True)
    wanted = fp8.fp8_cast.reference(large[-LAST:], multipliers[0, :1], "e4m3", True, False)[0]
    same(cases.difference("codes", codes[-LAST:], wanted)
         + cases.difference("transpose", turned[:, -LAST:].contiguous(), wanted.t().contiguous())
         + cases.difference("the others", tail, fp8.fp8_cast.reference(large[-LAST:], multipliers[1, :1], "e4m3", True,
                                                                       False)[0]))


def test_graphs_and_streams_and_no_waiting(device):
    """A captured call follows its input, and nothing waits for the device."""
    x, spec = expected.data(512, 1024, torch.bfloat16, device), cases.BLOCKS[0]
    calls = [lambda: tiles.quantize_both(x, spec, spec), lambda: rows.quantize(x, cases.ROWS[0])]
    for call in calls:
        call()
        torch.cuda.set_sync_debug_mode("error")
        call()
        torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = call()
        x.mul_(-3)
        graph.replay()
        same([line for got, want in zip(made, call(), strict=True) for line in cases.difference("replayed", got, want)])


@pytest.mark.parametrize("rule", ("amax", "amax_pow2", "delayed"))
def test_scales_of_magnitudes_of_all_sizes(rule, device):
    spec = QuantSpec.parse(f"e4m3/tensor fp32 {rule} nearest")
    for value in (*torch.logspace(-44, 38, 83).tolist(), 0.0, float("inf"), float("nan")):
        amax = torch.full((1, 1), value, device=device)
        made = (tensors.scales_by_known([amax], [amax.view(1)], spec, 0)[:2] if rule == "delayed"
                else tensors.scales_of([amax], spec))
        for one, other in zip(made, ref.scale_of_amax(amax, spec), strict=True):
            torch.testing.assert_close(one, other.expand(1, 4, 1), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rule", ("amax", "amax_pow2"))
@pytest.mark.parametrize("count", (1, 60, 2048, tensors.MOST_MAGNITUDES))
def test_casts_by_magnitudes_of_all_sizes(count, rule, device):
    spec, x = QuantSpec.parse(f"e4m3/tensor fp32 {rule} nearest"), expected.data(132, 96, torch.bfloat16, device)
    for value in (*torch.logspace(-44, 38, 83).tolist(), 0.0, float("inf"), float("nan")):
        found = torch.zeros(count, device=device)
        found[-1] = value
        made = tensors.cast_by_magnitudes([x, x], [found, x[:, 0].abs().float()], spec, plain=True, turned=True)
        wanted = fp8.fp8_casts_by_rows.reference([x, x], [found, x[:, 0].abs().float()], str(spec), True, True)
        for one, other in zip(made, wanted, strict=True):
            same(cases.difference(f"by {value}", one, other))


@pytest.mark.parametrize("shape", ((1, 1), (33, 70), (132, 4096), (5000, 3001), (8192, 2048)), ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", cases.DELAYED, ids=str)
def test_casts_by_earlier_steps(spec, dtype, shape, device):
    for odd in (1.0, float("inf"), float("nan")):
        x = expected.data(*shape, dtype, device)
        x[-1, -1] = odd
        for known in (0.0, 0.01, 1e4, float("nan")):
            given = [torch.full((1,), known, device=device), torch.full((1, 1), 1.0, device=device)]
            for margin in (0, 2):
                same(cases.check_known([x, x[: shape[0] // 2 + 1]], given, spec, margin))


def test_the_ops_are_repeated_from_cpp(device):
    """Three calls of a signature, the third without Python, whatever provider is preferred."""
    x = expected.data(130, 416, torch.bfloat16, device)
    for op, arguments in ((fused.cuda_quantize_bytes, ("e4m3/128 fp32 amax_pow2 nearest",)),
                          (fused.cuda_quantize_bytes, ("int8/row fp32 amax nearest",)),
                          (fused.cuda_quantize_bytes_both, ("e4m3/32 e8m0 ceil nearest",) * 2)):
        provider = next(p for p in op.providers if p.name == "triton")
        for _ in range(4):
            for got, want in zip(op.overload_of(provider)(x, *arguments), op.reference(x, *arguments), strict=True):
                same(cases.difference("results", got, want))


def test_the_ops_of_several_tensors_are_repeated_from_cpp(device):
    LAUNCHER.start()
    xs = [expected.data(*shape, torch.bfloat16, device) for shape in ((128, 416), (64, 32))]
    rows = [x.abs().amax(1) for x in xs]
    table = fp8.fp8_scales.reference(rows, str(cases.TENSORS[0]))[0]
    for op, arguments in ((fp8.amax_of_each, (xs,)), (fp8.fp8_scales, (rows, str(cases.TENSORS[0]))),
                          (fp8.fp8_casts, (xs, table, "e4m3", True, True)),
                          (fp8.fp8_casts_by_rows, (xs, rows, str(cases.TENSORS[0]), True, True)),
                          (fp8.fp8_cast_by_rows, (xs[0], rows[0], str(cases.TENSORS[0]), True, True)),
                          (fp8.fp8_casts_by_known, (xs, [torch.ones(1, device=device), torch.zeros(1, device=device)],
                                                    str(cases.DELAYED[0]), 1, True, True))):
        before = LAUNCHER.counts(op.name).replays
        for _ in range(4):
            got, want = op(*arguments), op.reference(*arguments)
            for one, other in zip(*((made if isinstance(made, (tuple, list)) else (made,)) for made in (got, want)),
                                  strict=True):
                same(cases.difference("results", one, other))
        assert LAUNCHER.missing is not None or LAUNCHER.counts(op.name).replays == before + 2
