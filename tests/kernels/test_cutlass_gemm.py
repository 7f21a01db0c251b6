"""The product from tensors: what reaches the C interface on any machine, and on a Blackwell GPU the numbers."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from cutlass_tools import random_operand

from quartet.kernels.cutlass import gemm as module
from quartet.kernels.cutlass.configuration import Configuration, ConfigurationError, arch_of, choose, table
from quartet.kernels.cutlass.gemm import OUTPUT_OF, gemm
from quartet.kernels.cutlass.library import KernelError, Library, Problem
from quartet.kernels.cutlass.tune import TUNED, tune
from quartet.kernels.reference import swizzle_scales

ARCH = arch_of(torch.cuda.get_device_capability()) if torch.cuda.is_available() else None


def operand(kind, rows, k, gen, device="cpu"):
    """Codes, swizzled scales and float64 values of a random matrix."""
    codes, scales, values = random_operand(kind, rows, k, gen)
    return codes.to(device), swizzle_scales(scales).to(device), values


@pytest.fixture
def calls(monkeypatch):
    """A pretended sm_100a device with 148 multiprocessors, whose library only remembers what it was asked to run."""
    seen = []

    def run(problem, workspace, stream):
        seen.append(SimpleNamespace(problem=problem, workspace=workspace, stream=stream))

    def prepared(configuration, m, n, k):
        seen.append(configuration)
        return SimpleNamespace(run=run), 256

    monkeypatch.setattr(module, "_device", lambda device: ("sm_100a", 148))
    monkeypatch.setattr(module, "_prepared", prepared)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    return seen


@pytest.mark.parametrize("kind", ("mxf4", "mxf8"))
def test_what_reaches_the_kernel(calls, gen, kind):
    a, a_scales, _ = operand(kind, 40, 256, gen)
    b, b_scales, _ = operand(kind, 24, 256, gen)
    alpha, bias = torch.full((), 16 / 9), torch.zeros(24, dtype=torch.float16)
    d = gemm(a, a_scales, b, b_scales, alpha, kind=kind, dtype=torch.float16, bias=bias)
    assert d.shape == (40, 24) and d.dtype == torch.float16
    configuration, call = calls
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
    configuration, call = calls
    assert (configuration.accumulate, configuration.output) == (True, "fp32")
    p = call.problem
    assert (p.lda, p.ldc, p.ldd, p.c, p.d, p.alpha) == (512, 64, 64, total.data_ptr(), total.data_ptr(), None)


def test_a_single_row_has_any_stride(calls, gen):
    a, a_scales, _ = operand("mxf4", 1, 64, gen)
    gemm(a.as_strided((1, 32), (5, 1)), a_scales, a.as_strided((8, 32), (0, 1)), a_scales, kind="mxf4")
    assert calls[1].problem.lda == 64


def test_a_configuration_of_ones_own(calls, gen):
    a, a_scales, _ = operand("mxf4", 8, 64, gen)
    own = Configuration("mxf4", "sm_100a", (256, 256, 256), (2, 1), "2sm")
    gemm(a, a_scales, a, a_scales, kind="mxf4", configuration=own)
    assert calls[0] == own
    with pytest.raises(ConfigurationError, match="does not fit the call: it has output 'bf16', not 'fp32'; bias False"):
        gemm(a, a_scales, a, a_scales, kind="mxf4", dtype=torch.float32, bias=torch.zeros(8), configuration=own)
    with pytest.raises(ConfigurationError, match="it has arch 'sm_120a', not 'sm_100a'"):
        gemm(a, a_scales, a, a_scales, kind="mxf4", configuration=next(table(["sm_120a"], ["mxf4"])))


def test_tuning_remembers_the_fastest(calls, gen, monkeypatch):
    from quartet.kernels.cutlass import tune as tuning

    a, a_scales, _ = operand("mxf4", 64, 256, gen)
    times = {c.name: 10.0 + i for i, c in enumerate(reversed(list(table(["sm_100a"], ["mxf4"]))))}
    slowest, *_, fastest = table(["sm_100a"], ["mxf4"])

    def clock(run):
        run()
        return times[next(c for c in reversed(calls) if isinstance(c, Configuration)).name]

    monkeypatch.setattr(tuning, "_microseconds", clock)
    try:
        found = tune(a, a_scales, a, a_scales, kind="mxf4")
        assert list(found) == [fastest, choose("sm_100a", "mxf4", 256, 4096, 4096), slowest]
        assert list(found.values()) == [10.0, 11.0, 12.0]
        calls.clear()
        gemm(a, a_scales, a, a_scales, kind="mxf4")
        assert calls[0] == fastest
        gemm(a, a_scales, a, a_scales, kind="mxf4", dtype=torch.float32)
        assert calls[2] == choose("sm_100a", "mxf4", 64, 64, 256, output="fp32")
    finally:
        TUNED.clear()


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
