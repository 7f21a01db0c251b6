"""The CUDA quantisers where there is no GPU: that they compile, how they share out a matrix, and what they decline."""

import shutil
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from quartet.backend import kernels_here
from quartet.kernels.build_cache import BuildError, notes_of
from quartet.kernels.cuda import build, library, ops
from quartet.kernels.spec import QuantSpec
from quartet.lowering.ir.ops import fused
from quartet.options import Options
from quartet.policy import Policy
from quartet.runtime.devices import Target

LENGTHS = (1, 31, 32, 33, 64, 100, 1000, 2048, 4096, 5120, 8192, 14336, 16384, 28672, 32768, 40000)
SEED, CPU = torch.tensor(5), torch.device("cpu")


def chain(spec=ops.STOCHASTIC, rotation=32):
    return SimpleNamespace(spec=spec, rotation=rotation, signs=None, seed=SEED, site=1, encode=None)


def no_nvcc():
    raise BuildError("nvcc is missing: install it")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc compiles the quantisers, and is not here")
def test_they_compile_once_and_serve_where_there_is_no_compiler(cache, monkeypatch):
    path = build.library()
    notes = notes_of(path)
    assert notes["registers"] <= 128 and notes["spills"] == 0  # 16 warps a multiprocessor
    image = path.read_bytes()
    for name in library._PARAMETERS:
        assert all(f"{name}_{cluster}".encode() in image for cluster in ops.AT_ONCE)
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    assert build.library() == path
    monkeypatch.setattr(build, "find_nvcc", no_nvcc)
    assert build.unavailable() is None and build.library() == path


def test_without_a_compiler_the_reason_names_the_remedy(cache, monkeypatch):
    monkeypatch.setattr(build, "find_nvcc", no_nvcc)
    assert "nvcc is missing: install it" in build.unavailable()
    with pytest.raises(BuildError, match="nvcc is missing"):
        build.library()
    assert "nvcc is missing" in fused.hopper(Target("cuda", "sm_90"))
    assert fused.hopper(Target.named("sm_90a")) is None  # with every compiler


def test_what_does_not_compile_is_tried_once_and_tritons_serve(cache, monkeypatch):
    asked = []

    def fails(*_):
        asked.append(1)
        raise BuildError("`nvcc` failed with status 1; gcc is too new\nmore")

    monkeypatch.setattr(build, "find_nvcc", lambda: "/usr/bin/nvcc")
    monkeypatch.setattr(build, "nvcc_version", lambda nvcc: "13.0.88")
    monkeypatch.setattr(build, "_compile", fails)
    for _ in range(2):
        reason = fused.hopper(Target("cuda", "sm_90"))
        assert reason == "the CUDA quantisers are not built: `nvcc` failed with status 1; gcc is too new"
    assert len(asked) == 1


@pytest.fixture
def compiler(cache, monkeypatch):
    """A compiler that waits until it may go on, and how often it was asked; ``fails`` says whether it fails then."""
    made = SimpleNamespace(asked=0, go=threading.Event(), fails=False)

    def compile(nvcc, version, path):
        made.asked += 1
        assert made.go.wait(20)
        if made.fails:
            raise BuildError("`nvcc` failed with status 1; gcc is too new")
        path.write_bytes(b"a cubin")
        return {}

    monkeypatch.setattr(build, "find_nvcc", lambda: "/usr/bin/nvcc")
    monkeypatch.setattr(build, "nvcc_version", lambda nvcc: "13.0.88")
    monkeypatch.setattr(build, "_compile", compile)
    yield made
    made.go.set()


@pytest.mark.parametrize("fails", [False, True])
def test_a_compilation_begun_before_is_foreseen_and_waited_for(compiler, fails):
    compiler.fails, hopper = fails, Target("cuda", "sm_90")
    fused.prepare(hopper, {None, QuantSpec.parse("e4m3/tensor fp32 amax nearest")})
    fused.prepare(Target("cuda", "sm_89"), {ops.STOCHASTIC})
    assert compiler.asked == 0 and fused.hopper(hopper, at_once=True) is None
    fused.prepare(hopper, {None, ops.STOCHASTIC})
    assert fused.hopper(hopper, at_once=True) is None
    threading.Timer(0.1, compiler.go.set).start()
    reason = fused.hopper(hopper)
    assert (reason is not None) == fails and compiler.asked == 1
    assert fused.hopper(hopper, at_once=True) == reason


def test_what_is_foreseen_without_a_compiler(cache, monkeypatch):
    monkeypatch.setattr(build, "find_nvcc", no_nvcc)
    assert "nvcc is missing" in fused.hopper(Target("cuda", "sm_90"), at_once=True)


@pytest.mark.parametrize(("policy", "options", "waits"), [
    ("quartet", {}, False), ("fp8", {}, False), ("quartet", {"portable_rounding": True}, True),
    ("quartet", {"disable_kernels": ("cuda_fold.triton",)}, True)])
def test_a_key_waits_for_the_compiler_only_where_the_graph_depends_on_it(compiler, monkeypatch, policy, options, waits):
    monkeypatch.setattr(Target, "of", classmethod(lambda cls, device: Target("cuda", "sm_90")))
    compiler.go.set()
    gm = torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph())
    said = kernels_here(gm, [torch.zeros(4, 4)], Options(Policy(policy), **options))
    assert "cuda_requantize.cuda=1" in said and compiler.asked == waits


def test_an_old_compiler_is_told_so(cache, monkeypatch):
    monkeypatch.setattr(build, "find_nvcc", lambda: "/usr/bin/nvcc")
    monkeypatch.setattr(build, "nvcc_version", lambda nvcc: "11.8.89")
    assert "version 11.8.89; install a CUDA toolkit of 12.0 or newer" in build.unavailable()


@pytest.mark.parametrize("name", ["cpu", "sm_80", "sm_89", "sm_100a", "sm_120a", "gfx942"])
def test_other_devices_have_tritons(name):
    assert "measured on compute capability 9.0" in fused.hopper(Target.named(name))


@pytest.mark.parametrize("stage", [ops.ROWS, ops.COLUMNS], ids=["rows", "columns"])
@pytest.mark.parametrize("count", [1, 100, 1000])
def test_a_strip_is_shared_out_whole(stage, count):
    for length in LENGTHS:
        how = ops.split(stage, length, count)
        assert how.cluster * how.length >= length and how.length % ops.SIDE == 0
        assert how.shared == ops.shared(stage, how.length, how.threads // 32) <= library.SHARED
        assert how.threads in (256, 512) and how.cluster in ops.AT_ONCE
        assert (how.cluster - 1) * how.length < length + 7 * ops.SIDE  # no thread block without work but by rounding


def test_few_strips_have_more_thread_blocks_and_many_smaller_clusters():
    few, many = (ops.split(ops.ROWS, 2048, count) for count in (8, 1024))
    assert few.cluster > many.cluster == 1


@pytest.mark.parametrize(("stage", "length", "count", "cluster", "warps"), [
    (ops.ROWS, 8192, 256, 2, 16), (ops.ROWS, 4096, 256, 1, 16), (ops.ROWS, 14336, 256, 4, 16),
    (ops.ROWS, 2048, 128, 1, 16), (ops.COLUMNS, 16384, 128, 8, 8), (ops.COLUMNS, 8192, 128, 2, 16),
    (ops.COLUMNS, 8192, 32, 8, 8)])
def test_the_splits_are_those_measured_to_be_fast(stage, length, count, cluster, warps):
    how = ops.split(stage, length, count)
    assert (how.cluster, how.threads) == (cluster, warps * 32)


def test_what_is_too_long_is_declined():
    assert ops.split(ops.ROWS, 10**6, 1) is None and ops.split(ops.COLUMNS, 10**6, 1) is None


def on_a_gpu(rows: int, cols: int, dtype: torch.dtype):
    """Stands for a tensor too large for this machine."""
    return SimpleNamespace(is_cuda=True, device=CPU, shape=torch.Size((rows, cols)), dtype=dtype, dim=lambda: 2,
                           stride=lambda i: (cols, 1)[i], data_ptr=lambda: 0, is_contiguous=lambda: True)


def test_more_random_elements_than_have_numbers_are_declined():
    fits, beyond = (on_a_gpu(2**22, cols, torch.bfloat16) for cols in (2**14, 2**14 + 8))
    assert ops.declines_both(fits, chain(), chain()) is None
    assert f"number {2**36} random elements" in ops.declines_both(beyond, chain(), chain())
    for matrices, reason in ((2**14, None), (2**14 + 1, f"number {2**36} random elements")):
        codes, scales = (on_a_gpu(matrices * 1024, cols, torch.uint8) for cols in (2048, 128))
        declined = ops.declines_requantize(codes, scales, QuantSpec(rule="even"), chain(), matrices)
        assert declined is None if reason is None else reason in declined


@pytest.mark.parametrize("other", [QuantSpec(rule="headroom"), QuantSpec(rule="ceil", rounding="stochastic"),
                                   replace(ops.STOCHASTIC, block=64)], ids=str)
def test_other_quantisers_are_declined(other):
    reason = ops.declines(chain(other), CPU)
    assert reason is not None and f"not by '{other}'" in reason
    assert ops.declines(chain(rotation=64), CPU) is not None and ops.declines(chain(), CPU) is None


@pytest.mark.parametrize("given", [{"seed": None}, {"signs": torch.ones(16)}, {"signs": torch.ones(32).double()},
                                   {"signs": torch.ones(64)[::2]}, {"seed": SEED.int()}], ids=str)
def test_what_a_chain_lacks_is_left_to_tritons_checks(given):
    assert "need an int64 seed and 32 float32 signs" in ops.declines(SimpleNamespace(**vars(chain()) | given), CPU)


def test_tensors_that_are_not_on_a_gpu_are_declined():
    """So the provider goes on to Triton's, whose interpreter runs there."""
    assert "on a GPU" in ops.declines_both(torch.zeros(32, 32, dtype=torch.bfloat16), chain(), chain())
    codes = torch.zeros(32, 16, dtype=torch.uint8)
    scales = torch.zeros(32, 1, dtype=torch.uint8)
    assert "on a GPU" in ops.declines_requantize(codes, scales, QuantSpec(rule="even"), chain(), 1)
    assert "without a gain" in ops.declines_requantize(codes, scales, ops.STOCHASTIC, chain(), 1)
