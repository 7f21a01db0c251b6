"""Ops repeated in C++, over a driver whose device is the host: what a plan holds for, and what stays in Python."""

import contextlib
import ctypes
import logging
import shutil
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quartet.kernels import launcher as launches
from quartet.kernels.launcher import Function, launch
from quartet.runtime.replay import library
from quartet.runtime.replay.library import Counts, Launcher
from quartet.runtime.replay.recorder import NotReplayable, Recorder

pytestmark = [pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
              pytest.mark.skipif(torch.cuda.is_available(), reason="the driver of this process is a real one")]

SCHEMA = "(Tensor x, float by, str how='', int? width=None, Tensor? other=None, int[]? sizes=None) -> Tensor"


@pytest.fixture
def declare(declare):
    return lambda run, schema=SCHEMA, **how: declare(run, schema, **how)


def function(driver, name, *parameters, threads=32):
    return Function(name, ctypes.cast(getattr(driver, name), ctypes.c_void_p).value, threads, 0, parameters)


@pytest.fixture
def scaled(driver):
    kernel = function(driver, "scale", "*", "*", "fp32", "*")

    def run(x, by, how="", width=None, other=None, sizes=None):
        y = x.new_empty(x.shape)
        launch(kernel, (x.numel(),), (x, y, by, None))
        return y

    return run


def recorded(op, *args):
    """The third result, which C++ makes, and the second, which was recorded."""
    op(*args)
    wanted = op(*args)
    return op(*args), wanted


def test_the_third_call_is_repeated_without_python(declare, scaled, driver):
    op, counts = declare(scaled)
    x = torch.randn(5)
    before = driver.stub_launches()
    for repeated in range(4):
        assert torch.equal(op(x, 2.0), x * 2)
        assert counts().replays == max(0, repeated - 1) and counts().runs == min(2, repeated + 1)
    assert driver.stub_launches() - before == 4
    assert counts() == Counts(replays=2, runs=2, plans=1)


def test_what_is_repeated_reads_new_data_and_writes_new_memory(declare, scaled):
    op, _ = declare(scaled)
    first, _ = recorded(op, torch.ones(8), 3.0)
    second = op(torch.full((8,), 2.0), 3.0)
    assert torch.equal(first, torch.full((8,), 3.0)) and torch.equal(second, torch.full((8,), 6.0))
    assert first.data_ptr() != second.data_ptr()


BASE = torch.zeros(64)
X = BASE[:8]


@pytest.mark.parametrize(("changed", "same"), [
    ((X, 2.0), False), ((X, 1.0, "b"), False), ((X, 1.0, "a much longer text"), False), ((X, 1.0, "a", 7), False),
    ((X, 1.0, "a", None), False), ((BASE[:9], 1.0), False), ((BASE[:8].view(2, 4), 1.0), False),
    ((BASE[:16:2], 1.0), False), ((BASE[1:9], 1.0), False), ((X.to(torch.float64), 1.0), False),
    ((X, 1.0, "a", 3, X), False), ((X, 1.0, "a", 3, BASE[8:16]), False), ((X, 1.0, "a", 3, None, [1, 2]), False),
    ((BASE[4:12], 1.0), True), ((torch.ones(8), 1.0), True), ((X, 1.0, "a", 3, None, None), True)],
    ids=lambda value: None if isinstance(value, bool) else "-".join(map(str, value))[:40])
def test_a_signature_has_all_that_a_launch_depends_on(declare, changed, same):
    ran = []

    def run(x, by, how="", width=None, other=None, sizes=None):
        ran.append(1)
        return x.new_empty(0)

    op, counts = declare(run)
    full = (X, 1.0, "a", 3, None, None)
    recorded(op, *full)
    assert counts().replays == 1
    op(*changed, *full[len(changed):])
    assert counts().replays == (2 if same else 1)
    assert len(ran) == (2 if same else 3)


@pytest.mark.parametrize(("first", "second"), [
    ((X, 1.0, "a", 3, BASE[8:16]), (X, 1.0, "a", 3, X)),
    ((X, 1.0, "a", 3, None, [1]), (X, 1.0, "a", 3, None, [1, 0])),
    ((X, 1.0, "a\0", 3), (X, 1.0, "a", 3)), ((X, 0.0), (X, -0.0))])
def test_near_signatures_differ(declare, scaled, first, second):
    op, counts = declare(scaled)
    recorded(op, *first)
    recorded(op, *second)
    assert counts() == Counts(replays=2, runs=4, plans=2)


def test_a_kernel_reads_the_argument_that_it_was_given(declare, driver):
    """Two arguments may be one tensor when the op is recorded, and two afterwards."""
    kernel = function(driver, "scale", "*", "*", "fp32", "*")

    def run(x, by, how="", width=None, other=None, sizes=None):
        y = x.new_empty(x.shape)
        launch(kernel, (x.numel(),), (other, y, by, None))
        return y

    op, _ = declare(run)
    a, b = torch.arange(16.0), torch.arange(16.0) + 100
    recorded(op, a, 1.0, "", None, a)
    assert torch.equal(recorded(op, a, 1.0, "", None, b)[0], b)
    assert torch.equal(op(b, 1.0, "", None, a), a)
    pair = torch.arange(32.0)  # two views of one memory
    assert torch.equal(recorded(op, pair[:16], 1.0, "", None, pair[16:])[0], pair[16:])
    assert torch.equal(op(a, 1.0, "", None, b), b)


def test_views_offsets_types_and_unwritten_results(declare, driver):
    kernel = function(driver, "scale", "*", "*", "fp32", "*")

    def run(x):
        y = x.new_empty(2, x.shape[1], dtype=torch.int32)
        launch(kernel, (x.shape[1],), (x[1], y.view(torch.float32)[1], 2.0, None))
        launch(kernel, (x.shape[1],), (x[0], y[0], 4.0, None))
        temporary = x.new_empty(x.shape[1])
        launch(kernel, (x.shape[1],), (y[1], temporary, 0.5, None))
        z = x.new_empty(2 * x.shape[1])
        launch(kernel, (x.shape[1],), (temporary, z[x.shape[1]:], 1.0, None))
        return y.view(torch.float32).t(), z[x.shape[1]:], x.new_empty(0, dtype=torch.float8_e4m3fn)

    op, counts = declare(run, "(Tensor x) -> (Tensor, Tensor, Tensor)")
    for x in (torch.randn(2, 7), torch.randn(2, 7)):
        found, wanted = recorded(op, x)
        for f, w in zip(found, wanted, strict=True):
            assert torch.equal(f.view(torch.uint8), w.view(torch.uint8)) if f.dtype.itemsize == 1 else torch.equal(f, w)
            assert (f.dtype, f.shape, f.stride(), f.storage_offset()) == (w.dtype, w.shape, w.stride(),
                                                                          w.storage_offset())
        assert torch.equal(found[0], torch.stack((x[0] * 4, x[1] * 2)).t()) and torch.equal(found[1], x[1])
    assert counts().replays == 4


def test_lists_of_tensors(declare, driver):
    kernel = function(driver, "scale", "*", "*", "fp32", "*")

    def run(xs, by):
        made = [x.new_empty(x.shape) for x in xs]
        for x, y in zip(xs, made, strict=True):
            launch(kernel, (x.numel(),), (x, y, by, None))
        return made

    op, counts = declare(run, "(Tensor[] xs, float by) -> Tensor[]")
    for xs in ([torch.randn(3), torch.randn(2, 2)], [torch.randn(3), torch.randn(2, 2)], [torch.randn(3)],
               [torch.randn(2, 2), torch.randn(3)]):
        found, wanted = recorded(op, xs, 2.0)
        assert type(found) is list and len(found) == len(xs)
        assert all(torch.equal(f, x * 2) and torch.equal(f, w) for f, w, x in zip(found, wanted, xs, strict=True))
    assert counts() == Counts(replays=6, runs=6, plans=3)
    twice = torch.arange(3.0)
    recorded(op, [twice, twice], 3.0)
    found = op([twice, twice + 1], 3.0)
    assert torch.equal(found[0], twice * 3) and torch.equal(found[1], twice * 3 + 3)
    xs = [torch.randn(3, requires_grad=True), torch.randn(2, 2)]
    before = counts().replays
    with torch.no_grad():
        op(xs, 2.0)
    assert counts().replays == before + 1


def test_zeros_are_written_at_their_place_in_the_order(declare, driver):
    kernel = function(driver, "scale", "*", "*", "fp32", "*")

    def run(x):
        y = x.new_zeros(2, 4)
        launch(kernel, (4,), (x, y[1], 1.0, None))
        z = x.new_empty(4)
        launch(kernel, (4,), (x, z, 1.0, None))
        z[2:].zero_()
        return y, z

    op, counts = declare(run, "(Tensor x) -> (Tensor, Tensor)")
    x = torch.ones(4)
    for y, z in (*(recorded(op, x)), op(x)):
        assert y.tolist() == [[0] * 4, [1] * 4] and z.tolist() == [1, 1, 0, 0]
    assert counts().plans == 1


def test_what_was_there_before_is_held(declare, driver):
    counter = torch.zeros((), dtype=torch.int64)
    kernel = function(driver, "count", "*")
    lasting = {"counter": counter}

    def run(x):
        launch(kernel, (3,), (lasting["counter"],))
        return x.new_empty(0)

    op, _ = declare(run, "(Tensor x) -> Tensor")
    recorded(op, torch.ones(1))
    assert counter.item() == 9
    lasting.clear()
    op(torch.ones(1))
    assert counter.item() == 12


def test_a_written_argument(declare, driver):
    kernel = function(driver, "count", "*")

    def run(x, counter):
        launch(kernel, (1,), (counter,))
        return x.new_empty(0)

    op, counts = declare(run, "(Tensor x, Tensor(a!) counter) -> Tensor")
    counter = torch.zeros(1, dtype=torch.int64)
    for _ in range(4):
        op(torch.ones(1), counter)
    assert counter.item() == 4 and counts().replays == 2


def copied(x):
    return x.clone()


def read(x):
    return x.new_empty(int(x[0].item()))


def returned(x):
    return x.view(-1)


def twice(x):
    y = x.new_empty(4)
    return y, y[:2]


def strided(x):
    y = x.new_empty(4)
    y[::2].zero_()
    return y


@pytest.mark.parametrize(("run", "said"), [(copied, "runs aten.clone"), (read, "runs aten._local_scalar_dense"),
                                           (returned, "has not made"), (twice, "share memory"), (strided, "gaps")])
def test_what_stays_in_python_says_why(declare, run, said, caplog):
    op, counts = declare(run, "(Tensor x) -> " + ("(Tensor, Tensor)" if run is twice else "Tensor"))
    x = torch.full((4,), 3.0)
    with caplog.at_level(logging.DEBUG, "quartet"):
        for _ in range(4):
            op(x)
    assert said in caplog.text and caplog.text.count("stays in Python") == 1
    assert counts() == Counts(replays=0, runs=4, plans=0, unplanned=1)


class Through(TorchDispatchMode):
    """Looks on, as PyTorch does in the first run of a compiled graph: what an op runs then is seen below autograd."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shown", [lambda x: x.contiguous(), lambda x: x.reshape(-1).view(3, 4)])
@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("mode", [contextlib.nullcontext, Through])
def test_what_may_be_a_view_or_a_copy_is_repeated_as_a_view_alone(declare, driver, shown, copies, mode):
    kernel = function(driver, "scale", "*", "*", "fp32", "*")

    def run(x):
        y = torch.empty(3, 4)
        launch(kernel, (x.numel(),), (shown(x), y, 2.0, None))
        return y

    op, counts = declare(run, "(Tensor x) -> Tensor")
    for _ in range(4):
        x = torch.randn(4, 3).t() if copies else torch.randn(3, 4)
        with mode():
            made = op(x)
        assert torch.equal(made, x * 2)
    assert counts() == (Counts(runs=4, unplanned=1) if copies else Counts(replays=2, runs=2, plans=1))


def test_a_tensor_of_unseen_origin_is_no_constant():
    x = torch.ones(4)
    recorder = Recorder((x,))
    recorder.launched(Function("scale", 1, 32, 0, ("*",)), (1, 1, 1), (torch.from_dlpack(x.view(2, 2)),))
    with pytest.raises(NotReplayable, match="origin is not seen"):
        recorder.plan(x, lambda dtype: 0)


@pytest.fixture
def owned(launcher, declare, scaled):
    """``call(i, expected)`` of an op with one of two owners: Python is asked, with what ``repeated`` says then, or C++
    serves it; ``permits[0]`` is what Python permits, True for every call."""
    asked, permits, weights = [], [False], [torch.ones(4), torch.ones(4)]

    def run(x, by, how="", width=None, other=None, sizes=None):
        if other is not None:
            asked.append(launcher.repeated())
            launcher.forbid() if permits[0] is None else launcher.permit(permits[0])
        return scaled(x, by)

    op, counts = declare(run, owner=4)

    def call(i, expected):
        asked.clear()
        assert torch.equal(op(weights[i], 2.0, "", None, weights[i]), weights[i] * 2)
        assert asked == expected

    return call, lambda i: weights[i].add_(1), permits, counts


def test_a_call_with_an_owner_is_served_once_a_version_while_python_permits_it(owned):
    call, write, permits, counts = owned
    call(0, [False])
    call(1, [False])
    call(0, [True])  # the same version: Python decides
    for _ in range(4):
        write(0)
        call(0, [])
        write(1)
        call(1, [])
        call(1, [True])
    assert counts().replays == 6 and counts().plans == 1
    permits[0] = None
    call(0, [True])
    for _ in range(2):
        write(0)
        call(0, [False])
    permits[0] = False
    call(0, [False])
    write(0)
    call(0, [])


def test_a_step_of_an_optimizer_counts_as_a_write(owned, launcher):
    """AdamW's fused kernel leaves version counters as they are."""
    call, write, _, counts = owned
    call(0, [False])
    call(0, [True])
    for _ in range(3):
        launcher.stepped()
        call(0, [])
        call(0, [True])
    write(0)
    launcher.stepped()
    call(0, [])
    assert counts().replays == 2  # one of the others was recorded


def test_every_call_with_an_owner_is_served_until_that_is_forbidden(owned, launcher):
    call, write, permits, counts = owned
    permits[0] = True
    call(0, [False])
    for _ in range(2):
        call(0, [])
        call(0, [])
        write(0)
    call(1, [False])
    permits[0] = False
    launcher.forbid_all()
    call(0, [False])
    call(0, [True])


def test_a_permit_ends_with_its_call(launcher, declare, scaled):
    launcher.permit(True)
    launcher.forbid()
    assert not launcher.repeated()


def test_plans_are_bounded(declare, scaled):
    op, counts = declare(scaled)
    torch.ops.quartet_replay.limit(8)
    for size in range(1, 30):
        x = torch.randn(size)
        assert torch.equal(recorded(op, x, 2.0)[0], x * 2)
        assert counts().plans + counts().unplanned <= 8
    assert counts().forgotten == 3 and counts().replays == 29


def test_an_error_of_the_driver_names_op_and_kernel(declare, driver):
    kernels = [function(driver, "scale", "*", "*", "fp32", "*", threads=n) for n in (32, 2048)]
    used = []

    def run(x):
        y = x.new_empty(x.shape)
        launch(kernels[0], (x.numel(),), (x, y, 1.0, None))
        if launches.active_recorder() is not None:
            launches.active_recorder().launched(kernels[1], (1, 1, 1), (x, y, 1.0, None))
        return y

    op, _ = declare(run, "(Tensor x) -> Tensor")
    x = torch.ones(2)
    op(x), op(x)
    with pytest.raises(RuntimeError, match=r"quartet::test_replay_\d+: the launch of scale failed with "
                                           r"CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES \(701\)"):
        op(x)
    with pytest.raises(RuntimeError, match="the launch of scale failed with CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"):
        launch(kernels[1], (1,), (x, x, 1.0, None))
    assert not used


def test_a_thread_without_a_context_gets_one(declare, scaled, driver):
    op, counts = declare(scaled)
    x = torch.ones(4)
    op(x, 2.0), op(x, 2.0)
    driver.stub_wants_context(1)
    try:
        made = []
        thread = threading.Thread(target=lambda: made.append(op(x, 2.0)))
        thread.start()
        thread.join()
    finally:
        driver.stub_wants_context(0)
    assert torch.equal(made[0], x * 2) and counts().replays == 1


def test_threads(declare, scaled):
    op, counts = declare(scaled)
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for i in range(200):
            x = torch.randn(1 + i % 7, generator=generator)
            if not torch.equal(op(x, 2.0), x * 2):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and counts().plans == 7
    assert counts().replays + counts().runs == 800 and counts().runs < 100


def test_an_op_inside_an_op(declare, scaled):
    """Each is repeated by itself: the outer one, which calls another op, stays in Python."""
    inner, inner_counts = declare(scaled)
    outer, outer_counts = declare(lambda x: inner(x, 2.0), "(Tensor x) -> Tensor")
    x = torch.ones(4)
    for _ in range(5):
        assert torch.equal(outer(x), x * 2)
    assert outer_counts() == Counts(runs=5, unplanned=1) and inner_counts().plans == 1
    assert inner_counts().replays >= 2


def test_an_error_in_python_is_the_users_and_leaves_nothing(declare):
    def run(x):
        raise ValueError("no such shape")

    op, counts = declare(run, "(Tensor x) -> Tensor")
    for _ in range(3):
        with pytest.raises(ValueError, match="no such shape"):
            op(torch.ones(2))
    assert counts() == Counts(runs=3, unplanned=1)


def test_a_users_mode_sees_the_op(declare, scaled):
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    op, counts = declare(scaled)
    x = torch.ones(4)
    for _ in range(4):
        with Watch():
            assert torch.equal(op(x, 2.0), x * 2)
    assert [func for func in seen if func.namespace == "quartet"] == [op] * 4 and counts().replays == 2


def test_with_and_without_gradients(declare, scaled):
    op, counts = declare(scaled)
    x = torch.ones(4, requires_grad=True)
    with torch.no_grad():
        recorded(op, x, 2.0)
    assert torch.equal(op(x, 2.0), x * 2) and counts().replays == 2
    with torch.inference_mode():
        assert torch.equal(op(torch.ones(4), 2.0), torch.full((4,), 2.0)) and counts().replays == 3


def test_another_implementation_makes_plans_void(launcher, declare, scaled):
    op, counts = declare(scaled)
    x = torch.ones(4)
    recorded(op, x, 2.0)
    name = op._schema.name.removeprefix("quartet::")
    launcher.withdraw(name)
    assert torch.equal(op(x, 2.0), x * 2) and counts() == Counts(replays=1, runs=2)
    launcher.offer(name, SCHEMA, lambda x, *rest: x + 5, "cpu")
    for _ in range(3):
        assert torch.equal(op(x, 2.0), x + 5)


def test_switched_off(declare, scaled):
    op, counts = declare(scaled)
    x = torch.ones(4)
    recorded(op, x, 2.0)
    torch.ops.quartet_replay.enable(False)
    try:
        assert torch.equal(op(x, 2.0), x * 2) and counts() == Counts(replays=1, runs=3, plans=1)
    finally:
        torch.ops.quartet_replay.enable(True)


def test_functions_and_launches_are_checked(driver):
    with pytest.raises(ValueError, match="'tensordesc'"):
        Function("f", 1, 32, 0, ("*", "tensordesc"))
    kernel = function(driver, "scale", "*", "*", "fp32", "*")
    with pytest.raises(ValueError, match="scale takes 4 arguments, not 1"):
        launch(kernel, (1,), (None,))
    x, y = torch.arange(4.0), torch.zeros(4)
    launch(kernel, (0,), (x, y, 2.0, None))
    assert not y.any()
    launch(kernel, (2, 2), (x, y, 2.0, torch.ones(1, dtype=torch.int64)))
    assert torch.equal(y, x * 2 + 1)


def test_without_a_compiler_python_launches_and_says_so(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    made = Launcher()
    assert made.status().startswith("Python: cannot run the C++ compiler")
    with caplog.at_level(logging.WARNING, "quartet"):
        made.start()
        made.start()
    assert caplog.text.count("launched from Python") == 1 and "install g++" in made.missing


def test_start_waits_for_the_build_that_was_begun_before(monkeypatch, stub, driver):
    begun, go, built, calls = threading.Event(), threading.Event(), library.library(), []

    def slow():
        calls.append(threading.current_thread())
        begun.set()
        assert go.wait(20)
        return built

    monkeypatch.setattr(library, "library", slow)
    made = Launcher()
    made.prepare()
    made.prepare()
    assert begun.wait(20) and made.status() != "C++, loaded"
    threading.Timer(0.1, go.set).start()
    made.start()
    assert made.status() == "C++, loaded"
    assert len(calls) == 1 and calls[0] is not threading.current_thread()


def test_no_op_waits_for_a_build_under_way(monkeypatch, stub, driver):
    from torch._subclasses.fake_tensor import FakeTensorMode

    go, built = threading.Event(), library.library()
    monkeypatch.setattr(library, "library", lambda: go.wait(20) and built)
    made = Launcher()
    first = made.offer("patient_probe", "(Tensor x) -> Tensor", lambda x: x)
    made.withdraw("patient_probe")
    made.prepare()
    with FakeTensorMode():
        x = torch.empty(4, device="cuda")
        assert first(x) is x and made.building and made.status() != "C++, loaded"
        go.set()
        made._building.join(20)
        assert first(x) is x and made.status() == "C++, loaded"


@pytest.mark.parametrize("fails", [False, True])
def test_no_process_waits_for_a_build_when_it_ends(monkeypatch, tmp_path, fails):
    """It does for the threads of a pool, whoever started them."""
    compiled = []

    def compile(command, *about):
        compiled.append((threading.current_thread(), command[-1]))
        if fails and "-c" in command:
            raise library.BuildError("out of memory")

    monkeypatch.setattr(library, "run_compiler", compile)
    monkeypatch.setattr(library, "_python_headers", lambda: tmp_path)
    if fails:
        with pytest.raises(library.BuildError, match="out of memory"):
            library._compile(["g++"], tmp_path / "made.so")
    else:
        library._compile(["g++"], tmp_path / "made.so")
    *sources, (last, _) = compiled if not fails else (*compiled, (threading.current_thread(), ""))
    assert [thread.daemon and not thread.is_alive() for thread, _ in sources] == [True, True]
    assert last is threading.current_thread()


def test_a_build_begun_before_fails_once(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    made = Launcher()
    made.prepare()
    with caplog.at_level(logging.WARNING, "quartet"):
        made.start()
    made.prepare()
    assert caplog.text.count("launched from Python") == 1 and "install g++" in made.missing


def test_the_user_may_want_python(monkeypatch):
    monkeypatch.setenv(library.VARIABLE, "python")
    assert Launcher().status() == f"Python: {library.VARIABLE}=python"
    monkeypatch.setenv(library.VARIABLE, "rust")
    assert "'rust' is unknown" in Launcher().status()


def test_a_measurement_does_not_wait_for_the_library(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    launcher, asked = Launcher(), []
    monkeypatch.setattr(Launcher, "start", lambda self: asked.append(True))
    first = launcher.offer("postponed_probe", "(Tensor x) -> Tensor", lambda x: x)
    with FakeTensorMode():
        x = torch.empty(4, device="cuda")
        with launcher.postponed():
            assert first(x) is x and not asked
        assert first(x) is x and asked
