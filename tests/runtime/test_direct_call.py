"""Ops called past PyTorch's dispatcher: what is served there, what is left to it, and that nobody can tell."""

import ctypes
import gc
import shutil
import sys
import warnings
import weakref

import pytest
import torch

from quartet.kernels.launcher import Function, launch
from quartet.runtime.compat import call_through, function_of
from quartet.runtime.replay import library
from quartet.runtime.replay.library import Counts

pytestmark = [pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
              pytest.mark.skipif(torch.cuda.is_available(), reason="the driver of this process is a real one"),
              pytest.mark.skipif(library._python_headers() is None, reason="needs Python's headers")]
SCHEMA = ("(Tensor x, float by, SymInt n=4, bool twice=False, str how='', ScalarType dtype=float, int[]? sizes=None, "
          "Tensor? other=None) -> (Tensor, Tensor)")


@pytest.fixture
def op(declare, driver):
    """An op, with what reached the dispatcher in ``op.usual``."""
    kernel = Function("scale", ctypes.cast(driver.scale, ctypes.c_void_p).value, 32, 0, ("*", "*", "fp32", "*"))

    def run(x, by, n=4, twice=False, how="", dtype=torch.float32, sizes=None, other=None):
        y = x.new_empty(n, dtype=dtype)
        launch(kernel, (n,), (x if other is None else other, y, by * (1 + twice), None))
        return y, x.new_empty(0, dtype=torch.uint8)

    called, counts = declare(run, SCHEMA)
    direct, usual = function_of(called), []

    def watched(*args, **kwargs):
        usual.append(args)
        return direct.usual(*args, **kwargs)

    call_through(called, declare.launcher._direct(called._schema.name.removeprefix("quartet::").encode(), watched))
    yield called, usual, counts
    call_through(called, direct)


X = torch.arange(8.0)


def warm(op, *args, **kwargs):
    for _ in range(3):
        made = op(*args, **kwargs)
    return made


def served(op, usual, *args, **kwargs):
    """Whether a call is served without the dispatcher, which gives what that gives."""
    wanted = warm(op, *args, **kwargs)
    usual.clear()
    for one, two in zip(op(*args, **kwargs), wanted, strict=True):
        assert torch.equal(one, two) and (one.dtype, one.shape, type(one)) == (two.dtype, two.shape, type(two))
    return not usual


@pytest.mark.parametrize(("args", "kwargs"), [
    ((X, 2.0), {}), ((X, 2.0, 8), {}), ((X, 2.0, 8, True, "some text", torch.float32, [1, 2], X + 1), {}),
    ((X, 2.0, 3, False, "", torch.float32, None, None), {}), ((X, 2.0), {"n": 2}), ((X,), {"by": 0.5, "other": X}),
    ((torch.nn.Parameter(X, requires_grad=False), 2.0), {}), ((), {"x": X, "by": 1.5, "sizes": [], "other": None})],
    ids=lambda value: None)
def test_what_is_served(op, args, kwargs):
    called, usual, _ = op
    assert served(called, usual, *args, **kwargs)


def test_results_are_new_and_right(op):
    called, usual, counts = op
    warm(called, X, 2.0)
    usual.clear()
    before = counts()
    first, empty = called(X, 2.0)
    second, _ = called(X + 1, 2.0)
    assert torch.equal(first, X[:4] * 2) and torch.equal(second, (X + 1)[:4] * 2) and empty.shape == (0,)
    assert not usual and counts() == Counts(before.replays + 2, before.runs, 1, 0)


class Odd(torch.Tensor):
    pass


@pytest.mark.parametrize(("args", "kwargs"), [
    ((X, 2), {}), ((X.as_subclass(Odd), 2.0), {}), ((X, 2.0, 4, 1), {}), ((X, torch.tensor(2.0)), {}),
    ((X, 2.0, 4, False, "", torch.float32, (1, 2)), {})], ids=["int", "subclass", "bool", "scalar", "tuple"])
def test_what_is_left_to_the_dispatcher(op, args, kwargs):
    called, usual, _ = op
    assert not served(called, usual, *args, **kwargs)


@pytest.mark.parametrize(("args", "kwargs"), [
    ((X,), {}), ((X, 2.0, "4"), {}), ((X, 2.0, 4, False, "", torch.float32, None, None, None), {}),
    ((X, 2.0), {"unknown": 1}), ((X, 2.0), {"x": X}), ((X, None), {}), ((X, 2.0, 2**70), {}),
    ((X, 2.0, 4, False, "\ud800"), {})])
def test_what_is_wrong_is_told_by_the_dispatcher(op, args, kwargs):
    called, usual, _ = op
    warm(called, X, 2.0)
    with pytest.raises((RuntimeError, TypeError, UnicodeEncodeError, OverflowError)):
        called(*args, **kwargs)
    assert called(X, 2.0)[0].shape == (4,)


def test_gradients_to_be_recorded_are_the_dispatchers(op):
    called, usual, _ = op
    x = X.clone().requires_grad_()
    with torch.no_grad():
        assert served(called, usual, x, 2.0)
    usual.clear()
    called(x, 2.0)
    assert usual
    with torch.inference_mode():
        assert served(called, usual, X.clone(), 2.0)


def test_modes_see_the_op(op):
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    called, usual, _ = op
    warm(called, X, 2.0)
    for mode in (Dispatch, Functions):
        seen.clear()
        with mode():
            made = called(X, 2.0)
        assert seen == [called] and torch.equal(made[0], X[:4] * 2)


def test_a_profiler_sees_the_op(op):
    called, usual, _ = op
    warm(called, X, 2.0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        called(X, 2.0)
    assert any(event.name == called._schema.name for event in profiler.events())
    usual.clear()
    called(X, 2.0)
    assert not usual


def test_transforms_and_fakes_are_the_dispatchers(op):
    from torch._subclasses.fake_tensor import FakeTensorMode

    called, usual, _ = op
    name = called._schema.name
    torch.library.register_fake(name, lambda x, by, n=4, *rest, **more: (x.new_empty(n), x.new_empty(0)))
    warm(called, X, 2.0)
    with FakeTensorMode() as mode:
        made, _ = called(mode.from_tensor(X), 2.0)
    assert type(made).__name__ == "FakeTensor"
    compiled = torch.compile(lambda x: called(x, 2.0, 8)[0] + 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(X), X * 2 + 1)
    with warnings.catch_warnings(action="ignore"):  # that no rule batches it
        mapped = torch.vmap(lambda x: called(x, 2.0, 8)[0])(X.expand(3, 8).clone())
    assert torch.equal(mapped, X.expand(3, 8) * 2)


def test_nothing_leaks(op):
    called, usual, _ = op
    warm(called, X, 2.0)
    x, text, sizes = torch.arange(8.0), "a text of its own", [1, 2, 3]
    warm(called, x, 2.0, 4, False, text, torch.float32, sizes, x)
    usual.clear()
    gc.collect()
    before = [sys.getrefcount(value) for value in (x, text, sizes, torch.float32)]
    for _ in range(100):
        called(x, 2.0, 4, False, text, torch.float32, sizes, x)
        with pytest.raises((RuntimeError, TypeError)):
            called(x, 2.0, "4")
        usual.clear()
    assert [sys.getrefcount(value) for value in (x, text, sizes, torch.float32)] == before
    made, _ = called(x, 2.0)
    gone = weakref.ref(made)
    del made
    assert gone() is None


def test_what_was_withdrawn_is_called_as_ever(declare, op):
    called, _, _ = op
    name = called._schema.name.removeprefix("quartet::")
    warm(called, X, 2.0)
    declare.launcher.withdraw(name)
    assert not hasattr(function_of(called), "usual") or torch.equal(called(X, 2.0)[0], X[:4] * 2)


def test_an_op_that_is_not_attached(launcher):
    with pytest.raises(RuntimeError, match="no_such_op is not attached"):
        launcher._direct(b"no_such_op", print)
