"""The Triton kernels on a GPU, bit for bit against the reference on the same GPU."""

import pytest
import torch
import triton_expected as expected

pytest.importorskip("triton")

from quartet.kernels import reference as ref  # noqa: E402
from quartet.kernels.reference.products import grouped  # noqa: E402
from quartet.kernels.spec import QuantSpec  # noqa: E402
from quartet.kernels.triton import draws  # noqa: E402
from quartet.kernels.triton.quantize import cast, ops, rotations
from quartet.kernels.triton.quantize.chain import Chain  # noqa: E402
from quartet.lowering.ir.ops.core import random_bits  # noqa: E402

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ((33, 33), (64, 4096), (130, 4096), (17, 14336), (3, 50000))
SMALL = ((33, 33), (130, 4096))

QUEST = QuantSpec(rule="quest", sigma="rms", power="nearest", mask=True)
GUARDED = QuantSpec(rule="quest", mask=True)
STOCHASTIC = QuantSpec(rule="headroom", rounding="stochastic")
SEED = -8_765_432_109_876
# name: (quantiser, rotation, signed)
CHAINS = {
    "quest": (QUEST, 32, False),
    "guarded": (GUARDED, 32, False),
    "stochastic": (STOCHASTIC, 32, True),
    "ceil": (QuantSpec(), 0, False),
    "default": (expected.DEFAULT, expected.ROTATION, True),
    "even": (QuantSpec(rule="even"), 32, False),
    "even-mask": (QuantSpec(rule="even", mask=True), 32, False),
    "even-stochastic": (QuantSpec(rule="even", rounding="stochastic", mask=True), 0, False),
    "nearest-power": (QuantSpec(rule="quest", rounding="stochastic", sigma="rms", power="nearest", mask=True), 0,
                      False),
    "centred-64": (QuantSpec(rule="quest", sigma="centred", mask=True), 64, False),
    "floor-128": (QuantSpec(rule="floor", rounding="stochastic", mask=True), 128, True),
    "block-64": (QuantSpec(rule="headroom", block=64), 64, False),
}
VARIANTS = ([(name, torch.bfloat16, shape) for name in CHAINS for shape in SHAPES]
            + [(name, dtype, shape) for name in ("quest", "stochastic") for dtype in DTYPES[1:] for shape in SMALL])
FEW = ([(name, torch.bfloat16, shape) for name in ("quest", "stochastic") for shape in SHAPES]
       + [("stochastic", dtype, shape) for dtype in DTYPES[1:] for shape in ((64, 4096), (130, 4096))]
       + [(name, torch.bfloat16, shape) for name in ("guarded", "default", "even-mask") for shape in SMALL]
       + [("quest", torch.float32, (33, 33))])


def label(value):
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return "x".join(map(str, value)) if isinstance(value, tuple) else None


def chain(name, device, site=77):
    spec, rotation, signed = CHAINS[name]
    seed = torch.tensor(SEED, device=device)
    return Chain(spec, rotation, ref.random_signs(seed, 5, rotation) if signed else None, seed, site)


def inexact(device):
    return int(ops.inexact_blocks(device))


def same(lines):
    assert not lines, "\n".join(lines)


def check_rows(x, c):
    """One call that packs and folds, against the reference."""
    before = inexact(x.device)
    *packed, values, row_scales = ops.quantize(x, c, packed=True, folded=True)
    same(expected.quantized_difference("row", tuple(packed), expected.quantize(x, c), c.spec)
         + expected.fold_difference("row", (values, row_scales), packed[0], packed[1], c.spec,
                                    inexact(x.device) - before))


def check_both(x, along_rows, along_columns):
    codes, scales, t_codes, t_scales = ops.quantize_both(x, along_rows, along_columns)
    same(expected.quantized_difference("row", (codes, scales), expected.quantize(x, along_rows), along_rows.spec)
         + expected.quantized_difference("column", (t_codes, t_scales), expected.quantize(x.t(), along_columns),
                                         along_columns.spec))


@pytest.mark.parametrize(("name", "dtype", "shape"), VARIANTS, ids=label)
def test_rows(name, dtype, shape, device):
    check_rows(expected.data(*shape, dtype, device), chain(name, device))


@pytest.mark.parametrize("name", ("quest", "stochastic"))
def test_what_was_not_asked_for_is_not_returned(name, device):
    x = expected.data(130, 4096, torch.bfloat16, device)
    c = chain(name, device)
    both = ops.quantize(x, c, packed=True, folded=True)
    packed = ops.quantize(x, c, packed=True, folded=False)
    folded = ops.quantize(x, c, packed=False, folded=True)
    same([line for got, all_ in zip(packed[:3] + folded[3:], both, strict=True)
          for line in expected.difference("alone", got, all_)])
    assert all(t.numel() == 0 for t in packed[3:] + folded[:3])


@pytest.mark.parametrize(("name", "dtype", "shape"), FEW, ids=label)
def test_transposed(name, dtype, shape, device):
    check_rows(expected.data(*shape, dtype, device).t(), chain(name, device))


@pytest.mark.parametrize("name", ("centred-64", "floor-128", "block-64"))
def test_transposed_wide_units(name, device):
    check_rows(expected.data(300, 200, torch.bfloat16, device).t(), chain(name, device))


@pytest.mark.parametrize(("name", "dtype", "shape"), FEW, ids=label)
def test_both(name, dtype, shape, device):
    check_both(expected.data(*shape, dtype, device), chain(name, device), chain(name, device, site=2**32 - 1))


def test_both_of_different_chains(device):
    x = expected.data(150, 300, torch.bfloat16, device)
    check_both(x, chain("quest", device), chain("floor-128", device))
    check_both(x, chain("floor-128", device), chain("stochastic", device))


@pytest.mark.parametrize("shape", SHAPES, ids=label)
@pytest.mark.parametrize("name", ("quest", "guarded", "stochastic", "centred-64", "default"))
def test_requantize(name, shape, device):
    c = chain(name, device)
    codes, scales, _ = expected.quantize(expected.data(*shape, torch.bfloat16, device), chain("quest", device))
    same(expected.quantized_difference("column", ops.requantize(codes, scales, QUEST, c),
                                       expected.requantize(codes, scales, QUEST, c), c.spec))


@pytest.mark.parametrize("matrices, rows, cols", ((3, 40, 320), (8, 256, 512), (64, 32, 128)))
def test_requantize_matrices_below_each_other(matrices, rows, cols, device):
    c = chain("stochastic", device)
    codes, scales, _ = expected.quantize(expected.data(matrices * rows, cols, torch.bfloat16, device),
                                         chain("quest", device))
    same(expected.quantized_difference("column", ops.requantize(codes, scales, QUEST, c, matrices=matrices),
                                       expected.requantize(codes, scales, QUEST, c, matrices), c.spec))


@pytest.mark.parametrize("block", (32, 64, 128))
@pytest.mark.parametrize("rows", (3, 200))
def test_fold(rows, block, device):
    spec = QuantSpec(block=block)
    codes, scales, _ = ref.quantize(expected.spread(rows).to(device), spec)
    before = inexact(device)
    folded = ops.fold(codes, scales, spec)
    counted = inexact(device) - before
    assert counted > 0
    same(expected.fold_difference("packed row", folded, codes, scales, spec, counted))


@pytest.mark.parametrize("span", (15, 16))
def test_fold_of_every_code_and_scale(span, device):
    """Exact where the blocks of a row span at most fifteen powers of two."""
    codes, scales = (t.to(device) for t in expected.every_fold(span))
    before = inexact(device)
    values, row_scales = ops.fold(codes, scales, QuantSpec())
    wrong = values.double() * row_scales.double() != expected.every_value(codes, scales)
    wrong = wrong.reshape(255, span, 32).any(-1)
    assert not wrong[:, :15].any() and inexact(device) - before == int(wrong.sum())
    assert bool(wrong.any()) is (span == 16)


@pytest.mark.parametrize("dtype", DTYPES, ids=label)
@pytest.mark.parametrize("block", (32, 128))
def test_dequantize(block, dtype, device):
    spec = QuantSpec(block=block, rule="headroom")
    x = torch.cat((expected.data(70, 4096), expected.broken().repeat(1, 43)[:, :4096])).to(device)
    codes, scales, _ = ref.quantize(x, spec)
    got = ops.dequantize(codes, scales, spec, dtype)
    ok = expected.finite(scales, block)
    assert got.isnan().equal(~ok) and not ok.all()
    same(expected.difference("values", got, expected.unscaled(codes, scales, spec).to(dtype), ok))


@pytest.mark.parametrize("n", (16, 32, 128))
def test_random_signs(n, device):
    seed = torch.tensor(SEED, device=device)
    for site in (0, 1, 77, 2**32 - 1):
        same(expected.difference("signs", draws.random_signs(seed, site, n), ref.random_signs(seed, site, n)))
    same(expected.difference("table", draws.sign_table(seed, 77, 1000, n), ref.sign_table(seed, 77, 1000, n)))


@pytest.mark.parametrize("shape", ((1, 16), (43, 80), (513, 4096), (0, 32)), ids=label)
def test_random_bits(shape, device):
    """The op of the IR, which takes the kernel for a seed on a GPU."""
    seed = torch.tensor(SEED, device=device)
    for site in (0, 1, 77, 2**32 - 1):
        wanted = ref.random_bits(seed, site, *shape).to(torch.int16)
        same(expected.difference("bits", random_bits(seed, site, *shape), wanted))


@pytest.mark.parametrize(("rotation", "cols", "masked", "dtype"), (
    *((32, 4096, True, dtype) for dtype in DTYPES), (32, 4090, True, torch.bfloat16), (64, 320, True, torch.bfloat16),
    (128, 250, False, torch.float32), (0, 96, True, torch.float16)), ids=label)
def test_mask_rotate(rotation, cols, masked, dtype, device):
    n = max(32, rotation)
    width = -(-cols // n) * n
    x = expected.data(65, width, dtype, device, seed=2)
    mask = torch.randint(0, 256, (65, width // 8), dtype=torch.uint8, device=device) if masked else None
    signs = None if masked else ref.random_signs(torch.tensor(SEED, device=device), 6, rotation)
    got = rotations.mask_rotate(x, mask, rotation=rotation, signs=signs, gain=1.7777, cols=cols, dtype=dtype)
    same(expected.difference("values", got, expected.mask_rotate(x, mask, rotation, signs, 1.7777, cols, dtype)))


@pytest.mark.parametrize("name", ("quest", "guarded", "ceil", "stochastic", "even", "even-stochastic"))
@pytest.mark.parametrize("edge", expected.edges())
def test_edges(edge, name, device):
    spec = CHAINS[name][0]
    x = expected.edges()[edge].to(device)
    c = Chain(spec, 0, None, torch.tensor(SEED, device=device), 3)
    check_rows(x, c)
    check_both(x, c, c)
    codes, scales, _ = ref.quantize(x, QuantSpec())
    same(expected.quantized_difference("column", ops.requantize(codes, scales, QuantSpec(), c),
                                       expected.requantize(codes, scales, QuantSpec(), c), spec))


@pytest.mark.parametrize("name", ("quest", "guarded", "stochastic", "default", "even-mask"))
def test_nan_and_infinity_stay_in_their_blocks(name, device):
    x = expected.broken().to(device)
    spec, _, _ = CHAINS[name]
    c = Chain(spec, 0, None, torch.tensor(SEED, device=device), 3)
    assert (ref.quantize(x, QUEST)[1] == 255).any() and (ref.quantize(x, QUEST)[1] != 255).any()
    check_rows(x, c)
    check_rows(x, chain(name, device))
    check_both(x, c, c)
    codes, scales, _ = ref.quantize(x, QUEST)
    same(expected.quantized_difference("column", ops.requantize(codes, scales, QUEST, c),
                                       expected.requantize(codes, scales, QUEST, c), spec))


@pytest.mark.parametrize("shape", ((33, 33), (130, 4096)), ids=label)
@pytest.mark.parametrize("dtype", DTYPES, ids=label)
@pytest.mark.parametrize("element", ("e4m3", "e5m2"))
def test_cast(element, dtype, shape, device):
    if element == "e4m3" and torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("e4m3 needs compute capability 8.9")
    x = expected.data(*shape, dtype, device)
    x[0, :4] = torch.tensor([float("inf"), float("-inf"), 60000.0, -0.0], device=device)
    multiplier = torch.full((1,), 7.3, device=device)
    exact = torch.where(x.isfinite(), x.float(), float("nan"))
    wanted = ref.fp8_encode(exact * multiplier, element)
    finite = wanted.float().isfinite()
    assert not finite[0, :2].any() and finite[0, 2:].all() and finite[1:].all()
    for plain, transposed in ((True, False), (False, True), (True, True)):
        codes, flipped = cast.cast(x, multiplier, wanted.dtype, plain=plain, transposed=transposed)
        for made in (codes,) * plain + (flipped.t(),) * transposed:
            assert torch.equal(made.float().isnan(), ~finite)
            same(expected.difference("codes", made, wanted, finite))
    multipliers = torch.linspace(0.1, 30, shape[1], device=device)
    _, flipped = cast.cast(x, multipliers, wanted.dtype, plain=False, transposed=True)
    same(expected.difference("columns", flipped, ref.fp8_encode(exact * multipliers, element).t(), finite.t())
         + expected.difference("transpose", cast.transpose(wanted), wanted.t()))


@pytest.mark.parametrize("dtype", DTYPES, ids=label)
@pytest.mark.parametrize("element", ("e4m3", "e5m2"))
def test_cast_of_named_rows(element, dtype, device):
    if element == "e4m3" and torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("e4m3 needs compute capability 8.9")
    x, spec = expected.data(130, 200, dtype, device), QuantSpec.parse(f"{element}/tensor fp32 amax nearest")
    index = torch.randint(-40, 130, (300,), device=device).clamp(min=-1).to(torch.int32)
    multiplier, _ = ref.scale_of_amax(ref.largest_magnitude(x), spec)
    wanted = ref.fp8_encode(grouped.gather_rows(x, index).float() * multiplier, element)
    for plain, transposed in ((True, False), (False, True), (True, True)):
        codes, flipped = cast.cast(x, multiplier, wanted.dtype, plain=plain, transposed=transposed, index=index)
        for made in (codes,) * plain + (flipped.t(),) * transposed:
            same(expected.difference("codes", made, wanted))


@pytest.mark.parametrize("shape", ((1, 33, 70), (5, 130, 96), (3, 64, 256), (2, 0, 16)), ids=label)
@pytest.mark.parametrize("dtype", DTYPES, ids=label)
@pytest.mark.parametrize("turned", (False, True))
def test_cast_of_matrices(turned, dtype, shape, device):
    if torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("e4m3 needs compute capability 8.9")
    count, rows, cols = shape
    x = expected.data(count * rows, cols, dtype, device).view(shape)
    x.view(-1)[:3] = torch.tensor([float("nan"), float("-inf"), 60000.0], device=device)[:x.numel()]
    multiplier = torch.full((1, 1), 7.3, device=device)
    exact = torch.where(x.isfinite(), x.float() * multiplier, float("nan"))
    wanted = ref.fp8_encode(exact.flatten(0, 1), "e4m3").view(shape)
    for laid in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
        codes = cast.cast_stack(laid, multiplier, wanted.dtype, turned=turned)
        assert codes.is_contiguous()
        assert torch.equal(codes.view(torch.uint8), (wanted.mT if turned else wanted).contiguous().view(torch.uint8))


def test_what_is_too_wide_for_a_grid_is_refused_by_name(device):
    c = chain("quest", device)
    x = torch.ones(1, 64 * 65536, dtype=torch.bfloat16, device=device)
    with pytest.raises(ValueError, match=r"quantize_both on \[1, 4194304\], .* along its columns into 2 parts"):
        ops.quantize_both(x, c, c)
    narrow = x[:, :-64]
    narrow[:, -64:] = expected.data(1, 64, torch.bfloat16, device)
    codes, scales, t_codes, t_scales = ops.quantize_both(narrow, c, c)
    same(expected.quantized_difference("row", (codes[:, -32:], scales[:, -2:]), expected.quantize(narrow[:, -64:], c),
                                       c.spec)
         + expected.quantized_difference("column", (t_codes[-64:], t_scales[-64:]),
                                         expected.quantize(narrow[:, -64:].t(), c), c.spec))


VIEWS = {
    "sliced": lambda x: x[:, 3:90],
    "every-other-row": lambda x: x[::2],
    "every-other-column": lambda x: x[:, ::2],
    "repeated": lambda x: x[:1].expand(9, -1),
    "one-row": lambda x: x[4:5],
    "one-column": lambda x: x[:, 7:8],
    "sliced-words": lambda x: x[:, 2:88],
    "sliced-tiles": lambda x: x[:64, 4:132],
    "sliced-transposed": lambda x: x[5:70:2, 3:90].t(),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views(view, device):
    x = VIEWS[view](expected.data(80, 160, torch.bfloat16, device))
    check_rows(x, chain("quest", device))
    if view in ("sliced", "sliced-words", "sliced-tiles", "one-column", "repeated", "sliced-transposed"):
        check_both(x, chain("quest", device), chain("stochastic", device))


@pytest.mark.parametrize("shape", ((0, 64), (3, 0), (0, 0)), ids=label)
def test_empty(shape, device):
    x = torch.empty(shape, device=device, dtype=torch.bfloat16)
    c = chain("quest", device)
    codes, scales, mask, values, row_scales = ops.quantize(x, c, packed=True, folded=True)
    same(expected.quantized_difference("row", (codes, scales, mask), expected.quantize(x, c), QUEST))
    assert values.shape == (shape[0], codes.shape[1] * 2) and row_scales.shape == (shape[0], 1)
    check_both(x, c, chain("stochastic", device))
    same(expected.quantized_difference("column", ops.requantize(codes, scales, QUEST, chain("stochastic", device)),
                                       expected.requantize(codes, scales, QUEST, chain("stochastic", device)),
                                       STOCHASTIC))
    rotated = rotations.mask_rotate(x, None, rotation=32, signs=None, gain=2.0, cols=shape[1], dtype=x.dtype)
    same(expected.difference("rotated", rotated, x))


LAST = 65  # rows compared at the end of a tensor of more than 2^31 elements: two blocks of 32 and one row
ENOUGH = 24 << 30


@pytest.fixture
def large(device):
    """bf16 ``[2^19 + 1, 4096]``, of which the last rows are random."""
    free, _ = torch.cuda.mem_get_info(device)
    if free < ENOUGH:
        pytest.skip(f"{free >> 30} GiB of GPU memory are free, and this test needs {ENOUGH >> 30}")
    x = torch.ones(2**19 + 1, 4096, dtype=torch.bfloat16, device=device)
    assert x.numel() > 2**31
    x[-LAST:] = expected.data(LAST, 4096, torch.bfloat16, device)
    return x


def test_rows_beyond_2_31_elements(large):
    x, first = large, large.shape[0] - LAST
    c = chain("stochastic", x.device)
    codes, scales, _, values, row_scales = ops.quantize(x, c, packed=True, folded=True)
    wanted = expected.quantize(x[-LAST:], c, first)
    same(expected.quantized_difference("row", (codes[-LAST:], scales[-LAST:]), wanted, STOCHASTIC))
    exact = expected.unfold(values[-LAST:], row_scales[-LAST:]) == expected.unscaled(*wanted[:2], STOCHASTIC)
    assert exact.all()
    again = ops.fold(codes, scales, STOCHASTIC)
    same(expected.difference("values", again[0][-LAST:], values[-LAST:])
         + expected.difference("row scales", again[1][-LAST:], row_scales[-LAST:]))
    del values, again
    plain = ops.dequantize(codes, scales, STOCHASTIC, torch.bfloat16)
    same(expected.difference("plain", plain[-LAST:], expected.unscaled(*wanted[:2], STOCHASTIC).bfloat16()))


def test_columns_beyond_2_31_elements(large):
    x = large
    c = chain("ceil", x.device)
    wanted = expected.quantize(x[-LAST:].t(), c)
    codes, scales, t_codes, t_scales = ops.quantize_both(x, c, c)
    packed = expected.quantize(x[-LAST:], c)
    same(expected.quantized_difference("row", (codes[-LAST:], scales[-LAST:]), packed, c.spec)
         + expected.quantized_difference("column", (t_codes[:, -48:], t_scales[:, -3:]), wanted, c.spec))
    again = ops.requantize(codes, scales, c.spec, c)
    same(expected.quantized_difference("column", (again[0][:, -48:], again[1][:, -3:]),
                                       expected.requantize(*packed[:2], c.spec, c), c.spec))


def test_mask_rotate_beyond_2_31_elements(large):
    x = large
    mask = torch.randint(0, 256, (x.shape[0], 512), dtype=torch.uint8, device=x.device)
    got = rotations.mask_rotate(x, mask, rotation=32, signs=None, gain=1.0, cols=4096, dtype=x.dtype)
    wanted = expected.mask_rotate(x[-LAST:], mask[-LAST:], 32, None, 1.0, 4096, x.dtype)
    same(expected.difference("values", got[-LAST:], wanted))


def calls(x, c):
    """Every function of ``ops`` on one tensor and what comes of it."""
    codes, scales, mask, values, row_scales = ops.quantize(x, c, packed=True, folded=True)
    both = ops.quantize_both(x, c, c)
    again = ops.requantize(codes, scales, QUEST, c)
    folded = ops.fold(codes, scales, QUEST)
    rotated = rotations.mask_rotate(x, None, rotation=32, signs=c.signs, gain=2.0, cols=x.shape[1], dtype=x.dtype)
    plain = ops.dequantize(codes, scales, QUEST, x.dtype)
    signs = draws.random_signs(c.seed, c.site, 32)
    return (codes, scales, values, row_scales, *both, *again, *folded, rotated, plain, signs)


def test_another_stream(device):
    """The work goes to the current stream: it is done while the default one is still busy."""
    x, c = expected.data(130, 4096, torch.bfloat16, device), chain("stochastic", device)
    wanted = calls(x, c)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        calls(x, c)  # leaves its memory for what follows
    torch.cuda.synchronize(device)
    torch.cuda._sleep(4_000_000_000)
    with torch.cuda.stream(stream):
        got = calls(x, c)
    stream.synchronize()
    busy = not torch.cuda.default_stream(device).query()
    torch.cuda.synchronize(device)
    assert busy
    same([line for a, b in zip(got, wanted, strict=True) for line in expected.difference("on the stream", a, b)])


def test_nothing_waits_for_the_gpu(device):
    x, c = expected.data(130, 4096, torch.bfloat16, device), chain("stochastic", device)
    calls(x, c)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        calls(x, c)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    torch.cuda.synchronize(device)
    torch.cuda._sleep(4_000_000_000)
    calls(x, c)
    assert not torch.cuda.current_stream(device).query()
    torch.cuda.synchronize(device)


def test_another_device(device):
    if torch.cuda.device_count() < 2:
        pytest.skip("only one CUDA device")
    other = torch.device("cuda", (device.index + 1) % torch.cuda.device_count())
    x = expected.data(130, 4096, torch.bfloat16, device)
    here, there = calls(x, chain("stochastic", device)), calls(x.to(other), chain("stochastic", other))
    assert all(t.device == other for t in there)
    same([line for a, b in zip(here, there, strict=True)
          for line in expected.difference("on the other device", b.to(device), a)])
    assert torch.cuda.current_device() == device.index


def test_a_tensor_of_another_device_is_refused(device):
    with pytest.raises(ValueError, match="seed must be 1 contiguous int64 on cuda"):
        ops.quantize(torch.ones(4, 64, device=device), Chain(STOCHASTIC, seed=torch.tensor(1)), packed=True,
                     folded=False)


def test_a_captured_graph_draws_new_bits_at_each_replay(device):
    """Replays read the seed where it was, and count the blocks that do not fold as eager calls do."""
    x, c = expected.spread(8).to(device, torch.bfloat16), chain("stochastic", device)
    eager = {}
    for seed in (1, 2**40 + 7):
        c.seed.fill_(seed)
        before = inexact(device)
        eager[seed] = calls(x, c), inexact(device) - before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = calls(x, c)
    for seed, (wanted, counted) in eager.items():
        c.seed.fill_(seed)
        before = inexact(device)
        graph.replay()
        assert inexact(device) - before == counted > 0
        same([line for a, b in zip(captured, wanted, strict=True)
              for line in expected.difference(f"replay with seed {seed}", a, b)])
    (first, _), (second, _) = eager.values()
    assert not torch.equal(first[0], second[0])


def test_columns_of_rows_far_apart(device):
    """Element offsets within one tile exceed 2^31 as soon as 31 row strides do; if they wrap, they still hit zeros."""
    stride, before = 2**31 // 31 + 1, 2**31
    free, _ = torch.cuda.mem_get_info(device)
    if free < ENOUGH:
        pytest.skip(f"{free >> 30} GiB of GPU memory are free, and this test needs {ENOUGH >> 30}")
    memory = torch.zeros(before + 31 * stride + 64, dtype=torch.bfloat16, device=device)
    x = memory.as_strided((32, 64), (stride, 1), before)
    x.copy_(expected.data(32, 64, torch.bfloat16, device))
    check_both(x, chain("quest", device), chain("stochastic", device))
