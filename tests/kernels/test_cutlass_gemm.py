"""The product from tensors: what reaches the C interface on any machine, and on a Blackwell GPU the numbers."""

from types import SimpleNamespace

import pytest
import torch
from cutlass_tools import pretend, random_operand

from quartet.kernels.cutlass import gemm as module
from quartet.kernels.cutlass.configuration import Configuration, ConfigurationError, arch_of, choose, table
from quartet.kernels.cutlass.gemm import OUTPUT_OF, gemm
from quartet.kernels.cutlass.library import KernelError, Library, Problem
from quartet.kernels.cutlass.tune import tune
from quartet.kernels.reference import swizzle_scales
from quartet.lowering.targets.blackwell import block_scaled_ops

ARCH = arch_of(torch.cuda.get_device_capability()) if torch.cuda.is_available() else None


def operand(kind, rows, k, gen, device="cpu"):
    """Codes, swizzled scales and float64 values of a random matrix."""
    codes, scales, values = random_operand(kind, rows, k, gen)
    return codes.to(device), swizzle_scales(scales).to(device), values


@pytest.fixture
def calls(monkeypatch):
    """What a pretended sm_100a device was asked: (configuration, arguments of its library's opening), then the call."""
    return pretend(monkeypatch)


@pytest.mark.parametrize("kind", ("mxf4", "mxf8"))
def test_what_reaches_the_kernel(calls, gen, kind):
    a, a_scales, _ = operand(kind, 40, 256, gen)
    b, b_scales, _ = operand(kind, 24, 256, gen)
    alpha, bias = torch.full((), 16 / 9), torch.zeros(24, dtype=torch.float16)
    d = gemm(a, a_scales, b, b_scales, alpha, kind=kind, dtype=torch.float16, bias=bias)
    assert d.shape == (40, 24) and d.dtype == torch.float16
    configuration, asked, call = calls
    assert asked == (40, 24, 256, 0, 148)
    assert configuration == choose("sm_100a", kind, 40, 24, 256, output="fp16", bias=True)
    p = call.problem
    assert (p.m, p.n, p.k, p.multiprocessors) == (40, 24, 256, 148)
    assert (p.lda, p.ldb, p.ldd) == (256, 256, 24)
    assert (p.a, p.b, p.a_scales, p.b_scales) == tuple(x.data_ptr() for x in (a, b, a_scales, b_scales))
    assert (p.d, p.alpha, p.bias, p.c) == (d.data_ptr(), alpha.data_ptr(), bias.data_ptr(), None)
    assert call.workspace and call.stream == 7


def test_rows_of_views_and_in_place_accumulation(calls, gen):
    a, a_scales, _ = operand("mxf4", 80, 256, gen)
    b, b_scales, _ = operand("mxf4", 24, 256, gen)
    total = torch.zeros(40, 64)[:, :24]
    d = gemm(a[::2], a_scales[:1024], b, b_scales, kind="mxf4", dtype=torch.float32, c=total, out=total)
    assert d is total
    configuration, _, call = calls
    assert (configuration.accumulate, configuration.output) == (True, "fp32")
    p = call.problem
    assert (p.lda, p.ldc, p.ldd, p.c, p.d, p.alpha) == (512, 64, 64, total.data_ptr(), total.data_ptr(), None)


def test_a_single_row_has_any_stride(calls, gen):
    a, a_scales, _ = operand("mxf4", 1, 64, gen)
    gemm(a.as_strided((1, 32), (5, 1)), a_scales, a.as_strided((8, 32), (0, 1)), a_scales, kind="mxf4")
    assert calls[2].problem.lda == 64


def test_a_configuration_of_ones_own(calls, gen):
    a, a_scales, _ = operand("mxf4", 8, 64, gen)
    own = Configuration("mxf4", "sm_100a", (256, 256, 256), (2, 1), "2sm")
    gemm(a, a_scales, a, a_scales, kind="mxf4", configuration=own)
    assert calls[0] == own
    with pytest.raises(ConfigurationError, match="does not fit the call: it has output 'bf16', not 'fp32'; bias False"):
        gemm(a, a_scales, a, a_scales, kind="mxf4", dtype=torch.float32, bias=torch.zeros(8), configuration=own)
    with pytest.raises(ConfigurationError, match="it has arch 'sm_120a', not 'sm_100a'"):
        gemm(a, a_scales, a, a_scales, kind="mxf4", configuration=next(table(["sm_120a"], ["mxf4"])))


@pytest.mark.parametrize("kind", ("mxf4", "nvf4", "mxf8"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_a_product_over_no_terms_is_zero_and_the_epilogue(kind, dtype):
    codes = torch.empty(5, 0, dtype=torch.uint8), torch.empty(0, 8, dtype=torch.uint8).t()
    scales = torch.empty(0, dtype=torch.uint8)
    call = {"kind": kind, "dtype": dtype}
    bias, c = torch.randn(8).to(dtype), torch.randn(5, 8).to(dtype)
    zero = gemm(codes[0], scales, codes[1], scales, torch.full((), 3.0), **call)
    assert torch.equal(zero, torch.zeros(5, 8, dtype=dtype))
    on_the_cpu = torch.ops.quartet.block_scaled_mm(codes[0], scales, codes[1].contiguous(), scales, kind, 3.0, dtype)
    assert torch.equal(block_scaled_ops._cutlass(codes[0], scales, codes[1], scales, kind, 1.0, dtype), on_the_cpu)
    assert torch.equal(gemm(codes[0], scales, codes[1], scales, bias=bias, **call), bias.expand(5, 8))
    assert torch.equal(gemm(codes[0], scales, codes[1], scales, bias=bias, c=c, **call), c + bias)
    total, other = c.clone(), torch.full_like(c, torch.nan)
    assert gemm(codes[0], scales, codes[1], scales, c=total, out=total, **call) is total and torch.equal(total, c)
    assert gemm(codes[0], scales, codes[1], scales, out=other, **call) is other and not other.any()
    assert gemm(codes[0], scales, codes[1], scales, c=c, bias=bias, out=other, **call) is other
    assert torch.equal(other, c + bias)


@pytest.mark.parametrize(("m", "n", "k"), ((0, 8, 64), (8, 0, 64), (8, 8, 0)))
def test_an_empty_product_checks_what_it_writes_to(m, n, k):
    a, b, scales = (torch.empty(rows, k // 2, dtype=torch.uint8) for rows in (m, n, 0))
    assert gemm(a, scales, b, scales, kind="mxf4").shape == (m, n)
    wrong = torch.full((m + 1, n + 1), 7.0, dtype=torch.bfloat16)
    for name in ("out", "c"):
        with pytest.raises(ValueError, match=rf"{name} has to be \[{m}, {n}\] bfloat16"):
            gemm(a, scales, b, scales, kind="mxf4", **{name: wrong})
    with pytest.raises(ValueError, match="out has to be .* bfloat16 on cpu"):
        gemm(a, scales, b, scales, kind="mxf4", out=torch.empty(m, n))
    with pytest.raises(ValueError, match=f"bias has to be {n} contiguous"):
        gemm(a, scales, b, scales, kind="mxf4", bias=wrong[0])
    assert (wrong == 7).all()


def test_the_workspace_is_that_of_the_device(monkeypatch):
    seen = []

    def opened(configuration):
        return SimpleNamespace(can_implement=lambda problem: 0, check=lambda status, problem: None,
                               workspace_size=lambda problem: seen.append((problem.device, problem.multiprocessors)))

    monkeypatch.setattr(module, "load", opened)
    module._prepared.cache_clear()
    try:
        configuration = next(table(["sm_100a"], ["mxf4"]))
        module._prepared(configuration, 64, 64, 64, 1, 148)
        module._prepared(configuration, 64, 64, 64, 2, 160)
        assert seen == [(1, 148), (2, 160)]
    finally:
        module._prepared.cache_clear()


@pytest.mark.parametrize(("status", "message"), [
    (1, "a misaligned operand .*copy views with .clone"), (7, "an internal error .*CUDA refused the launch"),
    (11, "an invalid argument .*names the sizes it takes"), (99, r"an unknown status \(cutlass::Status 99\)"),
])
def test_statuses_become_errors(status, message):
    library = object.__new__(Library)
    library.configuration = next(table(["sm_100a"], ["nvf4"]))
    library.check(0, Problem())
    with pytest.raises(KernelError, match=f"quartet_nvf4_sm_100a_\\w+ reports {message}") as caught:
        library.check(status, Problem.contiguous(64, 32, 256))
    assert "M = 64, N = 32, K = 256, lda = 256, ldb = 256, ldc = 32, ldd = 32" in str(caught.value)


on_blackwell = [pytest.mark.gpu, pytest.mark.skipif(ARCH is None, reason="no GPU with block-scaled tensor cores")]


@pytest.mark.parametrize("kind", ("mxf4", "nvf4", "mxf8"))
@pytest.mark.parametrize(("m", "n", "k"), ((1, 8, 32), (130, 264, 544), (1024, 768, 4096)))
class TestOnTheDevice:
    pytestmark = on_blackwell

    def test_every_configuration(self, kind, m, n, k, gen):
        a, a_scales, a_values = operand(kind, m, k, gen, "cuda")
        b, b_scales, b_values = operand(kind, n, k, gen, "cuda")
        exact, magnitude = a_values @ b_values.t() * (16 / 9), a_values.abs() @ b_values.abs().t()
        alpha = torch.full((1,), 16 / 9, device="cuda")
        for dtype, tolerance in ((torch.bfloat16, 2**-8), (torch.float32, 2e-6)):
            for configuration in table([str(ARCH)], [kind], OUTPUT_OF[dtype]):
                d = gemm(a, a_scales, b, b_scales, alpha, kind=kind, dtype=dtype, configuration=configuration)
                error = (d.cpu().double() - exact).abs()
                assert (error <= tolerance * exact.abs() + 4e-6 * magnitude).all(), configuration.name

    def test_bias_accumulation_and_capture(self, kind, m, n, k, gen):
        a, a_scales, a_values = operand(kind, m, k, gen, "cuda")
        b, b_scales, b_values = operand(kind, n, k, gen, "cuda")
        bias, total = torch.randn(n, device="cuda"), torch.randn(m, n, device="cuda")
        before = total.clone()

        def step():
            gemm(a, a_scales, b, b_scales, kind=kind, dtype=torch.float32, bias=bias, c=total, out=total)

        step()
        total.copy_(before)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        graph.replay()
        graph.replay()
        exact = before.cpu().double() + 2 * (a_values @ b_values.t() + bias.cpu().double())
        assert (total.cpu().double() - exact).abs().max() <= 1e-4 * exact.abs().max()

    def test_tuning(self, kind, m, n, k, gen, tmp_path, monkeypatch):
        monkeypatch.setenv("QUARTET_CACHE_DIR", str(tmp_path / "tuned"))
        a, a_scales, a_values = operand(kind, m, k, gen, "cuda")
        b, b_scales, b_values = operand(kind, n, k, gen, "cuda")
        times = tune(a, a_scales, b, b_scales, kind=kind)
        assert set(times) == set(table([str(ARCH)], [kind]))
        assert all(2 * m * n * k / 30e15 < 1e-6 * time < 1e-2 for time in times.values())
        exact, magnitude = a_values @ b_values.t(), a_values.abs() @ b_values.abs().t()
        error = (gemm(a, a_scales, b, b_scales, kind=kind).cpu().double() - exact).abs()
        assert (error <= 2**-8 * exact.abs() + 4e-6 * magnitude).all()
