"""The short way to launch: taken for what Triton would not specialise anew, and only for that."""

import re
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent))

import triton_offline  # noqa: E402

from quartet.kernels import launcher  # noqa: E402
from quartet.kernels.spec import QuantSpec  # noqa: E402
from quartet.kernels.triton import draws
from quartet.kernels.triton.launch import _COMPILED, launch  # noqa: E402
from quartet.kernels.triton.quantize import ops  # noqa: E402


class Compiled:
    """Of a kernel whose ``scale`` is None and whose ``rows`` is 1."""

    function, src = 0xF00, SimpleNamespace(signature={
        "x": "*fp32", "scale": "constexpr", "rows": "constexpr", "gain": "fp32", "N": "constexpr", "MODE": "constexpr"})

    def __init__(self, log, **unusual):
        self.log = log
        about = {"name": "stand_in", "num_warps": 4, "shared": 512, "num_ctas": 1, "global_scratch_size": 0,
                 "profile_scratch_size": 0, "launch_pdl": False, "launch_cooperative_grid": False}
        self.metadata = SimpleNamespace(**about | unusual)

    def __getitem__(self, grid):
        return lambda *arguments: self.log.append(("again", grid, arguments))


class Kernel:
    """Stands for a triton.jit function: notes how it is launched."""

    __name__ = "stand_in"
    arg_names = ["x", "scale", "rows", "gain", "N", "MODE"]

    def __init__(self, compiles=True, **unusual):
        self.log, self.compiles, self.unusual = [], compiles, unusual

    def __getitem__(self, grid):
        def first(*arguments, **keywords):
            self.log.append(("first", grid, arguments, keywords))
            return Compiled(self.log, **self.unusual) if self.compiles else None
        return first


X = torch.zeros(64)


@pytest.fixture
def kernel():
    yield Kernel()
    _COMPILED.clear()


def run(kernel, x=X, scale=None, rows=32, gain=0.5, N=32, MODE="a"):
    launch(kernel, (3,), (x, scale, rows, gain), MODE=MODE, N=N, num_warps=4)
    return kernel.log[-1]


def run_quietly(kernel):
    launch(kernel, (3,), (X, None, 32, 0.5), MODE="a", N=32, num_warps=4)


def test_the_second_launch_is_short_and_passes_the_constants_in_the_kernels_order(kernel):
    how, grid, arguments, keywords = run(kernel)
    assert (how, grid, arguments) == ("first", (3,), (X, None, 32, 0.5))
    assert keywords == {"MODE": "a", "N": 32, "num_warps": 4, "enable_fp_fusion": False}
    assert run(kernel, rows=48, gain=0.25) == ("again", (3, 1, 1), (X, None, 48, 0.25, 32, "a"))


@pytest.mark.parametrize("change", [
    {"x": X[1:]}, {"x": X.to(torch.bfloat16)}, {"scale": X}, {"rows": 1}, {"rows": 33}, {"rows": 2**31}, {"N": 64},
    {"MODE": "b"},
])
def test_what_triton_specialises_is_launched_by_triton_first(kernel, change):
    run(kernel)
    assert run(kernel, **change)[0] == "first"
    assert run(kernel, **change)[0] == "again"
    assert run(kernel)[0] == "again"


def test_what_is_compiled_ahead_is_launched_the_short_way(kernel, monkeypatch):
    def warmup(*arguments, grid, **keywords):
        kernel.log.append(("ahead", grid, arguments, keywords))
        return Compiled(kernel.log)

    monkeypatch.setattr(kernel, "warmup", warmup, raising=False)
    with launcher.compiling_only():
        assert run(kernel)[0] == run(kernel)[0] == "ahead" and len(kernel.log) == 1
    assert kernel.log[0][3] == {"MODE": "a", "N": 32, "num_warps": 4, "enable_fp_fusion": False}
    assert run(kernel) == ("again", (3, 1, 1), (X, None, 32, 0.5, 32, "a"))


def test_what_fails_to_compile_ahead_is_launched_by_triton(kernel, monkeypatch):
    def fails(*arguments, **keywords):
        raise RuntimeError("no memory for a module")

    monkeypatch.setattr(kernel, "warmup", fails, raising=False)
    with launcher.compiling_only(), pytest.raises(RuntimeError, match="no memory"):
        run_quietly(kernel)
    assert kernel.log == [] and run(kernel)[0] == "first" and run(kernel)[0] == "again"


def test_a_thread_waits_for_what_another_compiles(kernel, monkeypatch):
    begun, go = threading.Event(), threading.Event()

    def warmup(*arguments, **keywords):
        begun.set()
        assert go.wait(20)
        return Compiled(kernel.log)

    def ahead():
        with launcher.compiling_only():
            run_quietly(kernel)

    monkeypatch.setattr(kernel, "warmup", warmup, raising=False)
    thread, other = threading.Thread(target=ahead), threading.Thread(target=run_quietly, args=(kernel,))
    thread.start()
    assert begun.wait(20)
    other.start()
    assert run(kernel, N=64)[0] == "first" and other.is_alive()
    go.set()
    thread.join(20)
    other.join(20)
    assert [how for how, *_ in kernel.log] == ["first", "again"]


def test_the_interpreter_has_nothing_to_compile_ahead(monkeypatch):
    interpreted = Kernel(compiles=False)
    monkeypatch.setattr(interpreted, "warmup", lambda *arguments, **keywords: None, raising=False)
    with launcher.compiling_only():
        run_quietly(interpreted)
    assert not interpreted.log and run(interpreted)[0] == "first"


class Recorder:
    def __init__(self):
        self.launches, self.reasons = [], []

    def launched(self, *launch):
        self.launches.append(launch)

    def refuse(self, reason):
        self.reasons.append(reason)


def test_a_recorder_learns_what_the_driver_was_given(kernel):
    recorder = Recorder()
    with launcher.recorded_by(recorder):
        run(kernel, rows=1)
        run(kernel, rows=1)
    run(kernel, rows=1)
    expected = launcher.Function("stand_in", 0xF00, 128, 512, ("*", "fp32", "*", "*"))
    assert recorder.launches == [(expected, (3, 1, 1), (X, 0.5, None, None))] * 2 and not recorder.reasons


@pytest.mark.parametrize("unusual", [{"num_ctas": 2}, {"global_scratch_size": 16}, {"launch_pdl": True}])
def test_a_recorder_learns_of_launches_that_are_no_functions_call(unusual):
    recorder, kernel = Recorder(), Kernel(**unusual)
    with launcher.recorded_by(recorder):
        run(kernel)
    assert not recorder.launches and recorder.reasons == ["stand_in is launched with scratch memory or in clusters"]
    _COMPILED.clear()


def test_a_parameter_that_no_launch_passes_ends_no_step(monkeypatch):
    recorder, kernel = Recorder(), Kernel()
    monkeypatch.setattr(Compiled, "src", SimpleNamespace(signature={**Compiled.src.signature, "gain": "bf16"}))
    with launcher.recorded_by(recorder):
        assert run(kernel)[0] == "first"
    (reason,) = recorder.reasons
    assert not recorder.launches and reason.startswith("stand_in has a parameter of type 'bf16'")
    _COMPILED.clear()


@pytest.mark.parametrize("grid", [(65536,), (2**31 - 1, 65535), (1, 65535, 65535)])
def test_a_grid_as_large_as_cuda_takes_is_launched(kernel, grid):
    for how in ("first", "again"):
        launch(kernel, grid, (X, None, 32, 0.5), N=32, MODE="a", num_warps=4)
        assert kernel.log[-1][:2] == (how, grid if how == "first" else (*grid, 1, 1)[:3])


@pytest.mark.parametrize("grid", [(1, 65536), (1, 65536, 1), (1, 1, 131070)])
@pytest.mark.parametrize("launched_before", [False, True])
def test_a_larger_one_is_refused(kernel, grid, launched_before):
    arguments = X.view(1, 64), X.view(2, 32), 32, 0.5
    if launched_before:
        launch(kernel, (1,), arguments, N=32, MODE="a", num_warps=4)
    size = " × ".join(map(str, (*grid, 1)[:3]))
    message = re.escape(
        f"stand_in on [1, 64], [2, 32] needs a grid of {size} programs, and CUDA launches at most 65535 along its "
        "second and third axis; split the tensor along its columns into 2 parts or more")
    with pytest.raises(ValueError, match=message):
        launch(kernel, grid, arguments, N=32, MODE="a", num_warps=4)
    assert len(kernel.log) == launched_before


def test_quantisers_say_how_wide_is_too_wide():
    x, narrow = (torch.empty(1, 64 * count, dtype=torch.bfloat16) for count in (65536, 65535))
    c = ops.Chain(QuantSpec(rule="headroom"), 32)
    (launched,) = triton_offline.launches(lambda: ops.quantize_both(narrow, c, c))
    assert launched.kernel.__name__ == "quantize_both"
    with pytest.raises(ValueError, match=r"quantize_both on \[1, 4194304\], .* grid of 1 × 65536 × 1 .* into 2 parts"):
        triton_offline.launches(lambda: ops.quantize_both(x, c, c))


def test_random_bits_are_drawn_a_group_at_a_time():
    with pytest.raises(ValueError, match="16 elements at a time; 40 columns"):
        draws.random_bits(torch.tensor(0), 0, 2, 40)


def test_another_kernel_is_another(kernel):
    run(kernel)
    other = Kernel()
    assert run(other)[0] == "first" and len(kernel.log) == 1


def test_where_nothing_is_compiled_every_launch_is_tritons():
    interpreted = Kernel(compiles=False)
    assert [run(interpreted)[0] for _ in range(3)] == ["first"] * 3
