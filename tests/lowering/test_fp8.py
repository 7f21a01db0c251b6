"""FP8 GEMMs on torch._scaled_mm: what is accepted, what the tensor cores are given, and the numbers."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from scaled_mm import rows_run_on_a_cpu
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from quartet.kernels import reference
from quartet.kernels.spec import QuantSpec
from quartet.lowering import ir, registry
from quartet.lowering.ir.operands import Product, Quantizer
from quartet.lowering.ir.ops import fp8 as fp8_ops
from quartet.lowering.targets import inductor
from quartet.lowering.targets.fp8 import lower as fp8

ops, aten = torch.ops.quartet, torch.ops.aten
CUDA = torch.device("cuda", 0)
TENSOR, ROW, TENSOR_E5M2 = map(QuantSpec.parse, (
    "e4m3/tensor fp32 amax nearest", "e4m3/row fp32 amax_pow2 nearest", "e5m2/tensor fp32 amax nearest"))
MX = QuantSpec("e4m3")


@pytest.fixture(autouse=True)
def forget():
    torch._dynamo.reset()


@pytest.fixture
def capability(monkeypatch):
    """As if there were one GPU of that capability."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    return lambda major, minor: monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(
        name="NVIDIA of the test", major=major, minor=minor, multi_processor_count=1))


# what is accepted

def choose(a, b, dtype=torch.bfloat16, device=CUDA):
    kernel, reasons = registry.choose(device, dtype, ((a, 0), (b, 0)))
    return kernel.name, reasons.get("cublaslt")


@pytest.mark.parametrize("version", ((8, 9), (9, 0), (10, 0), (12, 0)))
def test_tensor_and_row_scales_take_the_tensor_cores(capability, version):
    capability(*version)
    for spec in (TENSOR, ROW):
        assert choose(spec, spec) == ("cublaslt", None)
    assert choose(TENSOR_E5M2, TENSOR) == choose(ROW, TENSOR) == ("cublaslt", None)
    for dtype in (torch.float16, torch.float32):
        assert choose(TENSOR, TENSOR, dtype) == ("cublaslt", None)


@pytest.mark.parametrize("a, b, dtype, reason", (
    (TENSOR_E5M2, TENSOR_E5M2, torch.bfloat16, "no product of e5m2 and e5m2; make one operand e4m3"),
    (ROW, ROW, torch.float32, "with a scale a row the product is bfloat16, not float32"),
    (ROW, TENSOR, torch.float16, "with a scale a row the product is bfloat16, not float16"),
    (TENSOR, TENSOR, torch.float64, "not float64"),
    (MX, MX, torch.bfloat16, "not a scale every 32 elements"),
))
def test_what_is_refused_falls_to_the_next_kernel_with_the_reason(capability, a, b, dtype, reason):
    capability(9, 0)
    name, why = choose(a, b, dtype)
    assert name != "cublaslt" and reason in why


def test_devices_without_fp8_are_refused_by_what_they_are(capability, monkeypatch):
    assert "are on NVIDIA GPUs, not on cpu" in choose(TENSOR, TENSOR, device=torch.device("cpu"))[1]
    capability(8, 0)
    kernel, reasons = registry.choose(CUDA, torch.bfloat16, ((TENSOR, 0), (TENSOR, 0)))
    assert kernel is None
    assert reasons["cublaslt"] == "FP8 tensor cores need compute capability 8.9 or more, this device has 8.0"
    assert "no e4m3 here: Triton converts to both FP8 formats from compute capability 8.9 on" in reasons["inductor"]
    capability(9, 4)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName="gfx942"))
    assert "ROCm" in choose(TENSOR, TENSOR)[1]


def test_the_probe_of_the_doctor_names_both_granularities(capability):
    capability(9, 0)
    found = {(format, kernel): reason for format, kernel, reason in registry.probe(CUDA)}
    assert found["fp8 a tensor", "cublaslt"] is found["fp8 a row", "cublaslt"] is None
    assert found["fp8 a row", "cpp"] is not None and found["mx e4m3", "cublaslt"] is not None


# what the tensor cores are given

def product(x, w, a_spec, b_spec, dtype, flips=(False, False)):
    """Y = X·Wᵀ of quantised operands; a flipped one is given as its transpose, whose codes are turned."""
    operands = []
    for t, spec, flipped in ((x, a_spec, flips[0]), (w, b_spec, flips[1])):
        codes, scales, _ = ops.quantize(t, str(spec), None, 0)
        operands += [codes.t() if flipped else codes, scales]
    return ops.scaled_mm(*operands, str(a_spec), str(b_spec), dtype)


def lowered(function, *inputs):
    """The graph of ``function`` on (fake) inputs after lowering."""
    gm = make_fx(function, decomposition_table={aten.t.default: lambda x: aten.permute.default(x, [1, 0])})(*inputs)
    gemms = gm.graph.find_nodes(op="call_function", target=ir.SCALED_MM)
    fp8.lower(gm.graph, gemms, lambda spec, rotation, dtype: True)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    assert not gm.graph.find_nodes(op="call_function", target=ir.QUANTIZE)
    return gm


def calls(gm, target):
    return gm.graph.find_nodes(op="call_function", target=target)


def ceil16(n):
    return -(-n // 16) * 16


@pytest.mark.parametrize("m, n, k", ((64, 48, 32), (17, 50, 33), (1, 1, 1), (5, 1, 70)))
@pytest.mark.parametrize("flips", ((False, False), (True, False), (False, True)))
@pytest.mark.parametrize("a_spec, b_spec", ((TENSOR, TENSOR), (ROW, ROW), (TENSOR_E5M2, TENSOR), (TENSOR, ROW)))
def test_layout_is_what_scaled_mm_wants(a_spec, b_spec, flips, m, n, k):
    """On fake CUDA tensors: PyTorch's own checks of shapes and strides run as the nodes are made."""
    flips = [flip and spec.commutes_with_transpose for flip, spec in zip(flips, (a_spec, b_spec), strict=True)]
    with FakeTensorMode():
        x, w = (torch.empty((k, rows) if flip else (rows, k), dtype=torch.bfloat16, device=CUDA)
                for rows, flip in zip((m, n), flips, strict=True))
    gm = lowered(partial(product, a_spec=a_spec, b_spec=b_spec, dtype=torch.bfloat16, flips=flips), x, w)
    (gemm,) = calls(gm, aten._scaled_mm.default)
    a, b, a_scales, b_scales, bias, result, dtype, fast = (
        arg.meta["val"] if isinstance(arg, torch.fx.Node) else arg for arg in gemm.args)
    assert a.shape == (m, ceil16(k)) and a.stride() == (ceil16(k), 1)
    assert b.shape == (ceil16(k), ceil16(n)) and b.stride() == (1, ceil16(k))
    assert (bias, result, dtype, fast) == (None, None, torch.bfloat16, True)
    assert a_scales.dtype is b_scales.dtype is torch.float32 and a_scales.is_contiguous() and b_scales.is_contiguous()
    rows = ROW in (a_spec, b_spec) and (a_spec is ROW and m > 1 or n > 1)
    assert a_scales.shape == ((m, 1) if rows else (1, 1))
    assert b_scales.shape == ((1, ceil16(n)) if rows else (1, 1))
    assert gm.graph.output_node().args[0].meta["val"].shape == (m, n)
    if min(m, n, k) > 1:
        copied = len(calls(gm, fp8_ops.ROW_MAJOR)) + sum(
            c.args[4] for target in (fp8_ops.CAST, fp8_ops.CAST_ROWS, fp8_ops.CAST_BY_ROWS) for c in calls(gm, target))
        assert copied == sum(flips)


def test_codes_that_lie_well_are_neither_copied_nor_padded():
    with FakeTensorMode():
        x, w = (torch.empty(rows, 64, dtype=torch.bfloat16, device=CUDA) for rows in (33, 32))
    gm = lowered(partial(product, a_spec=TENSOR, b_spec=TENSOR, dtype=torch.bfloat16), x, w)
    assert not calls(gm, fp8_ops.ROW_MAJOR) and not calls(gm, aten.constant_pad_nd.default)
    assert {cut.meta["val"].dtype for cut in calls(gm, aten.slice.Tensor)} <= {torch.float32}  # of scales, not of codes
    assert [cast.args[3:] for cast in calls(gm, fp8_ops.CAST)] == [(True, False)] * 2  # each once, no transpose


def test_a_quantiser_that_another_family_reads_too_stays_for_it():
    def two(x, w, v):
        shared, own, other = (ops.quantize(t, str(s), None, 0)[:2] for t, s in ((x, TENSOR), (w, TENSOR), (v, MX)))
        return (ops.scaled_mm(*shared, *own, str(TENSOR), str(TENSOR), torch.float32),
                ops.scaled_mm(*shared, *other, str(TENSOR), str(MX), torch.float32))

    x, w, v = awkward(32, 64), awkward(16, 64), awkward(48, 64)
    with FakeTensorMode() as mode:
        gm = make_fx(two)(*map(mode.from_tensor, (x, w, v)))
    mine, foreign = calls(gm, ir.SCALED_MM)
    fp8.lower(gm.graph, [mine], lambda spec, rotation, dtype: spec == TENSOR)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    assert [str(node.args[1]) for node in calls(gm, ir.QUANTIZE)] == [str(TENSOR), str(MX)]
    assert all(Quantizer.of(operand.codes).node.target is ir.QUANTIZE for operand in Product.of(foreign).operands)
    assert len(calls(gm, aten._scaled_mm.default)) == 1
    for got, want in zip(gm(x, w, v), two(x, w, v), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7 * want.abs().max().item())


# the numbers

def awkward(rows, cols, dtype=torch.float32):
    g = torch.Generator().manual_seed(rows * 1009 + cols)
    x = torch.randn(rows, cols, generator=g) * torch.exp2(torch.randint(-12, 12, (rows, 1), generator=g).float())
    return x.to(dtype)


def same(got, want):
    assert got.dtype == want.dtype and got.shape == want.shape
    nan = got.float().isnan()
    assert torch.equal(nan, want.float().isnan())
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[got.element_size()]
    got, want = (t.contiguous().view(integer).masked_fill(nan, 0) for t in (got, want))
    assert torch.equal(got, want), f"{int((got != want).sum())} of {got.numel()} differ"


@pytest.mark.parametrize("m, n, k", ((40, 32, 64), (17, 9, 33), (1, 1, 5)))
@pytest.mark.parametrize("a_spec, b_spec, dtype", (
    (TENSOR, TENSOR, torch.float32), (TENSOR, TENSOR, torch.bfloat16), (TENSOR, TENSOR, torch.float16),
    (TENSOR_E5M2, TENSOR, torch.bfloat16), (ROW, ROW, torch.bfloat16), (ROW, TENSOR, torch.bfloat16)))
def test_lowered_product_runs_and_is_the_reference(a_spec, b_spec, dtype, m, n, k):
    if ROW in (a_spec, b_spec) and not rows_run_on_a_cpu():
        pytest.skip(f"torch {torch.__version__} has no _scaled_mm with row scales on a CPU")
    x, w = awkward(m, k, dtype), awkward(n, k, dtype) / 64
    flips = (a_spec is TENSOR, False)
    x = x.t().contiguous() if flips[0] else x
    function = partial(product, a_spec=a_spec, b_spec=b_spec, dtype=dtype, flips=flips)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        gm = lowered(function, mode.from_tensor(x), mode.from_tensor(w))
    got, want = gm(x, w), function(x, w)
    assert got.shape == want.shape and got.dtype is dtype
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * want.abs().max().item() * 1e-2)


@pytest.mark.parametrize("spec", (TENSOR, ROW, TENSOR_E5M2), ids=str)
@pytest.mark.parametrize("bad", (None, float("nan"), float("inf"), 0.0))
def test_aten_ops_in_place_of_a_quantiser_give_its_codes(spec, bad):
    x, w = awkward(9, 40), awkward(16, 40)
    if bad is not None:
        x[3] = 0
        x[3, 4] = bad

    def codes(x, w):
        a, b = (ops.quantize(t, str(s), None, 0) for t, s in ((x, spec), (w, TENSOR)))
        return (*a[:2], *b[:2], ops.scaled_mm(*a[:2], *b[:2], str(spec), str(TENSOR), torch.float32))

    with FakeTensorMode() as mode:
        gm = lowered(codes, mode.from_tensor(x), mode.from_tensor(w))
    outputs = gm.graph.output_node()
    outputs.args = (outputs.args[0][:4],)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    for got, want in zip(gm(x, w), codes(x, w)[:4], strict=True):
        same(got, want)


@pytest.mark.parametrize("element", ("e4m3", "e5m2"))
@pytest.mark.parametrize("amax", (2.0, 0.0, float("inf")))
def test_a_scale_from_earlier_steps_hides_nothing(element, amax):
    """Codes and their transpose: saturated where x is larger than it was, NaN where it is not finite."""
    spec = QuantSpec.parse(f"{element}/tensor fp32 delayed nearest")
    x, w, given = awkward(9, 40), awkward(16, 40), torch.full((1, 1), amax)
    x[3, 4:7] = torch.tensor([float("nan"), float("inf"), float("-inf")])

    def codes(x, w, given):
        a, b = ops.quantize(x, str(spec), None, 0, given), ops.quantize(w, str(TENSOR), None, 0)
        turned = a[0].t()
        y = ops.quantize(w[:9].t(), str(TENSOR), None, 0)
        return (*a[:2], turned, ops.scaled_mm(*a[:2], *b[:2], str(spec), str(TENSOR), torch.float32),
                ops.scaled_mm(turned, a[1], *y[:2], str(spec), str(TENSOR), torch.float32))

    with FakeTensorMode() as mode:
        gm = lowered(codes, *map(mode.from_tensor, (x, w, given)))
    (cast,) = [node for node in calls(gm, fp8_ops.CAST) if node.args[2:] == (element, True, True)]
    outputs = gm.graph.output_node()
    outputs.args = (outputs.args[0][:3],)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    got, want = gm(x, w, given), codes(x, w, given)
    for mine, reference_ in zip(got, want[:3], strict=True):
        same(mine, reference_)
    assert got[0][3, 4:7].isnan().all() and got[0][0].isnan().any() == (amax == float("inf"))


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    inductor.register()
    with fresh_cache(dir=str(tmp_path_factory.mktemp("inductor"))):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_semantic_ops_inside_inductor_are_the_reference(fresh, dtype):
    def run(x, w):
        a, b, c = (reference_free(t, s) for t, s in ((x, TENSOR), (w, ROW), (x.t(), TENSOR_E5M2)))
        return (*a, *b, *c, ops.dequantize(*b, str(ROW), dtype),
                ops.scaled_mm(*a, *b, str(TENSOR), str(ROW), dtype),
                ops.scaled_mm(c[0].t(), c[1], *b, str(TENSOR_E5M2), str(ROW), dtype))

    def reference_free(t, spec):
        return ops.quantize(t, str(spec), None, 0)[:2]

    x, w = awkward(17, 40, dtype), awkward(9, 40, dtype)
    x[2, 3], w[0], w[1, 1] = 0, 0, float("nan")
    results, code = run_and_get_code(torch.compile(run, fullgraph=True), x, w)
    assert "torch.ops.quartet" not in "".join(line for line in "\n".join(code).splitlines() if not line.startswith("#"))
    for got, want in zip(results, run(x, w), strict=True):
        same(got, want)
    assert torch.equal(results[0].view(torch.uint8), reference.quantize(x, TENSOR)[0].view(torch.uint8))
