"""The CUDA quantisers where there is no GPU: that they compile, how they share out a matrix, and what they decline."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from quartet.kernels.build_cache import BuildError, notes_of
from quartet.kernels.cuda import build, library, ops
from quartet.kernels.spec import QuantSpec
from quartet.lowering.ir.ops import fused
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
    assert notes["registers"] <= 128 and notes["spills"] <= 32  # two thread blocks of 256 threads a multiprocessor
    image = path.read_bytes()
    for name in library._PARAMETERS:
        assert all(f"{name}_{cluster}".encode() in image for cluster in ops.CLUSTERS)
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


def test_an_old_compiler_is_told_so(cache, monkeypatch):
    monkeypatch.setattr(build, "find_nvcc", lambda: "/usr/bin/nvcc")
    monkeypatch.setattr(build, "nvcc_version", lambda nvcc: "11.8.89")
    assert "version 11.8.89; install a CUDA toolkit of 12.0 or newer" in build.unavailable()


@pytest.mark.parametrize("name", ["cpu", "sm_80", "sm_89", "sm_100a", "sm_120a", "gfx942"])
def test_other_devices_have_tritons(name):
    assert "measured on compute capability 9.0" in fused.hopper(Target.named(name))


@pytest.mark.parametrize("strips", [ops.ROWS, ops.COLUMNS], ids=["rows", "columns"])
@pytest.mark.parametrize("count", [1, 100, 1000])
def test_a_strip_is_shared_out_whole(strips, count):
    for length in LENGTHS:
        how = ops.split(strips, length, count)
        assert how.cluster * how.length >= length and how.length % strips.unit == 0
        assert how.shared == strips.shared(how.length, how.threads // 32) <= library.SHARED
        assert how.threads in (256, 512) and how.cluster in ops.CLUSTERS
        assert (how.cluster - 1) * how.length < length + 7 * strips.unit  # no thread block without work but by rounding


def test_few_strips_have_more_thread_blocks_and_many_smaller_clusters():
    few, many = (ops.split(ops.ROWS, 2048, count) for count in (8, 1024))
    assert few.cluster > many.cluster == 1
    assert ops.split(ops.ROWS, 8192, 512) == ops.Split(4, 2048, 256, ops.ROWS.shared(2048, 8))
    assert ops.split(ops.COLUMNS, 16384, 128) == ops.Split(8, 2048, 256, ops.COLUMNS.shared(2048, 8))


def test_what_is_too_long_is_declined():
    assert ops.split(ops.ROWS, 10**6, 1) is None and ops.split(ops.COLUMNS, 10**6, 1) is None


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
