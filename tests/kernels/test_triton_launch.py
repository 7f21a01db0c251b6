"""The short way to launch: taken for what Triton would not specialise anew, and only for that."""

import pytest
import torch

pytest.importorskip("triton")

from quartet.kernels.triton.launch import _COMPILED, launch  # noqa: E402


class Compiled:
    def __init__(self, log):
        self.log = log

    def __getitem__(self, grid):
        return lambda *arguments: self.log.append(("again", grid, arguments))


class Kernel:
    """Stands for a triton.jit function: notes how it is launched."""

    arg_names = ["x", "scale", "rows", "gain", "N", "MODE"]

    def __init__(self, compiles=True):
        self.log, self.compiles = [], compiles

    def __getitem__(self, grid):
        def first(*arguments, **keywords):
            self.log.append(("first", grid, arguments, keywords))
            return Compiled(self.log) if self.compiles else None
        return first


X = torch.zeros(64)


@pytest.fixture
def kernel():
    yield Kernel()
    _COMPILED.clear()


def run(kernel, x=X, scale=None, rows=32, gain=0.5, N=32, MODE="a"):
    launch(kernel, (3,), (x, scale, rows, gain), MODE=MODE, N=N, num_warps=4)
    return kernel.log[-1]


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


def test_another_kernel_is_another(kernel):
    run(kernel)
    other = Kernel()
    assert run(other)[0] == "first" and len(kernel.log) == 1


def test_where_nothing_is_compiled_every_launch_is_tritons():
    interpreted = Kernel(compiles=False)
    assert [run(interpreted)[0] for _ in range(3)] == ["first"] * 3
