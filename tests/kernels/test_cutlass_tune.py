"""Which configuration is taken: named, measured or by the rule; measuring, with a clock that only pretends."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from cutlass_tools import pretend
from torch._subclasses.fake_tensor import FakeTensorMode
from traced import linear, trace

from quartet.kernels import build_cache
from quartet.kernels.build_cache import BuildError
from quartet.kernels.cutlass import selection
from quartet.kernels.cutlass import tune as tuning
from quartet.kernels.cutlass.configuration import Configuration, ConfigurationError, choose, every_tile, table
from quartet.kernels.cutlass.gemm import gemm
from quartet.kernels.cutlass.library import KernelError
from quartet.kernels.cutlass.selection import Product, measurements, remember, select
from quartet.kernels.cutlass.tune import microseconds, random_operand, tune, tune_once
from quartet.lowering.targets.blackwell import block_scaled_ops
from quartet.options import Options
from quartet.runtime import compat

TILES = list(table(["sm_100a"], ["mxf4"]))
LARGE, MIDDLE, SMALL = TILES
CPU = torch.device("cpu")


def product(m=64, n=64, k=256, **changes):
    return Product(**{"arch": "sm_100a", "kind": "mxf4", "output": "bf16", "bias": False, "accumulate": False, "m": m,
                      "n": n, "k": k, **changes})


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """What a pretended sm_100a device was asked, its cache folder empty."""
    monkeypatch.setenv("QUARTET_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv(selection.VARIABLE, raising=False)
    monkeypatch.setattr(tuning, "_given_up", set())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    selection.forget()
    yield pretend(monkeypatch)
    selection.forget()


@pytest.fixture
def clock(calls, monkeypatch):
    """Smaller tiles are faster; the tiles that were measured so far."""
    measured = []

    def pretended(run, device):
        run()
        measured.append(configurations(calls)[-1])
        return 10.0 * (1 + (LARGE, MIDDLE, SMALL)[::-1].index(measured[-1]))

    monkeypatch.setattr(tuning, "microseconds", pretended)
    return measured


def configurations(calls):
    return [seen for seen in calls if isinstance(seen, Configuration)]


def operands(m=64, n=64, k=256, kind="mxf4"):
    return *random_operand(kind, m, k, CPU), *random_operand(kind, n, k, CPU)


def test_tuning_remembers_the_fastest(calls, clock):
    assert choose("sm_100a", "mxf4", 8192, 4096, 4096) == LARGE
    found = tune(*operands(512, 512), kind="mxf4")
    assert list(found.items()) == [(SMALL, 10.0), (MIDDLE, 20.0), (LARGE, 30.0)] and clock == TILES
    gemm(*operands(512, 512), kind="mxf4")
    assert configurations(calls)[-1] == SMALL
    gemm(*operands(512, 512), kind="mxf4", dtype=torch.float32)  # was not measured
    assert configurations(calls)[-1] == choose("sm_100a", "mxf4", 512, 512, 256, output="fp32")


def test_another_process_reads_what_was_measured(calls, clock):
    remember(product(8192, 4096, 4096), CPU, {SMALL: 5.0, LARGE: 7.0})
    path = measurements("sm_100a", CPU)
    assert path.parent == build_cache.cache_dir() and json.loads(path.read_text()) == {
        "device": "pretended GPU", "driver": selection.driver(),
        "microseconds": {"mxf4 bf16 8192x4096x4096": {SMALL.name: 5.0, LARGE.name: 7.0}}}
    selection.forget()
    assert select(product(8192, 4096, 4096), CPU, 148) == SMALL
    assert select(product(8192, 4096, 4096, kind="nvf4"), CPU, 148).tile == (256, 256, 256)
    assert not list(path.parent.glob(f"{path.stem}.*[!nk]")), "nothing is left of writing it"
    build_cache.clear()
    selection.forget()
    assert select(product(8192, 4096, 4096), CPU, 148) == LARGE


def test_measurements_are_of_one_device_driver_and_source(calls, monkeypatch):
    paths = {measurements("sm_100a", CPU)}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another GPU")
    paths.add(measurements("sm_100a", CPU))
    monkeypatch.setattr(selection, "driver", lambda: "NVRM version: 999")
    paths.add(measurements("sm_100a", CPU))
    monkeypatch.setattr(selection, "source_of", lambda configuration: f"another {configuration.name}")
    paths.add(measurements("sm_100a", CPU))
    assert len(paths) == 4


def test_the_driver_names_itself(tmp_path):
    (tmp_path / "version").write_text("NVRM version: 580.65.06  Release Build\nGCC version: 12\n")
    assert selection.driver(tmp_path / "version") == "NVRM version: 580.65.06  Release Build"
    assert selection.driver(tmp_path / "absent") == ""


@pytest.mark.parametrize("content", (b"", b"\xff", b"[]", b'{"microseconds": 3}',
                                     b'{"microseconds": {"mxf4 bf16 8192x4096x4096": 3}}',
                                     b'{"microseconds": {"mxf4 bf16 8192x4096x4096": {"a kernel that was": 3}}}'))
def test_measurements_that_make_no_sense_are_passed_over(calls, content):
    measurements("sm_100a", CPU).write_bytes(content)
    assert select(product(8192, 4096, 4096), CPU, 148) == LARGE
    remember(product(8192, 4096, 4096), CPU, {MIDDLE: 5.0})
    assert select(product(8192, 4096, 4096), CPU, 148) == MIDDLE


def test_a_folder_that_others_can_write_gives_no_measurements(calls, tmp_path):
    remember(product(8192, 4096, 4096), CPU, {SMALL: 5.0})
    (tmp_path / "cache").chmod(0o777)
    selection.forget()
    assert select(product(8192, 4096, 4096), CPU, 148) == LARGE
    with pytest.raises(BuildError, match="chmod 700"):
        remember(product(8192, 4096, 4096), CPU, {SMALL: 5.0})


@pytest.mark.parametrize(("one", "other", "same"), [
    ((8192, 4096, 4096), (8100, 4096, 4096), True), ((8192, 4096, 4096), (8193, 4096, 4096), False),
    ((1, 8, 32), (128, 128, 128), True), ((129, 128, 128), (256, 128, 128), True),
    ((8192, 11008, 4096), (8192, 12288, 4096), True), ((8192, 14336, 4096), (8192, 12288, 4096), False)])
def test_shapes_that_share_a_measurement(one, other, same):
    assert (product(*one).shape_class == product(*other).shape_class) is same


def test_epilogues_share_none():
    assert len({product(output=output, bias=bias, accumulate=c).shape_class for output in ("bf16", "fp32")
                for bias in (False, True) for c in (False, True)}) == 8


def test_a_tile_of_ones_own(calls, clock, monkeypatch):
    tune(*operands(), kind="mxf4")
    monkeypatch.setenv(selection.VARIABLE, "128x128x128_1x1_pingpong, 256x128x256_2x1_2sm,256x256x256_2x1_2sm")
    gemm(*operands(), kind="mxf4")
    assert configurations(calls)[-1] == MIDDLE
    assert select(product(arch="sm_120a"), CPU, 188).schedule == "pingpong"
    assert select(product(8192, 4096, 4096, kind="mxf8"), CPU, 148).tile == (256, 256, 128)  # names none of its tiles
    monkeypatch.setenv(selection.VARIABLE, "256x128")
    with pytest.raises(ConfigurationError, match=rf"{selection.VARIABLE}: no kernel has the tile '256x128'; possible: "
                                                 r"256x256x256_2x1_2sm, .*128x128x768_1x1_1sm_ultra"):
        gemm(*operands(), kind="mxf4")
    assert len(set(every_tile())) == len(every_tile()) and LARGE.tile_name in LARGE.name


def test_what_cannot_be_built_or_run_is_left_out(calls, monkeypatch, caplog):
    def failing(run, device):
        run()
        configuration = configurations(calls)[-1]
        if configuration == SMALL:
            raise BuildError("nvcc is missing")
        if configuration == LARGE:
            raise KernelError("an internal error")
        return 3.0

    monkeypatch.setattr(tuning, "microseconds", failing)
    assert tune(*operands(), kind="mxf4") == {MIDDLE: 3.0}
    assert f"{SMALL.name} is left out of the measurement: nvcc is missing" in caplog.text
    assert f"{LARGE.name} is left out of the measurement: an internal error" in caplog.text
    monkeypatch.setattr(tuning, "microseconds", refuse)
    with pytest.raises(BuildError, match="no kernel for mxf4 bf16 128x128x256 on sm_100a could be measured"):
        tune(*operands(), kind="mxf4")


def refuse(run, device):
    raise BuildError("nothing can be built")


# when the op is asked to tune

def test_the_first_call_of_a_shape_class_tunes(calls, clock):
    for m in (512, 500, 512):
        tune_once(*operands(m, 512), None, kind="mxf4", dtype=torch.bfloat16)
    assert clock == TILES
    tune_once(*operands(1024, 512), None, kind="mxf4", dtype=torch.bfloat16)
    assert clock == TILES * 2


def test_the_op_tunes_only_if_told_to(calls, clock):
    a, a_scales, b, b_scales = operands(512, 512)
    for told, measured in ((False, 0), (True, 3)):
        block_scaled_ops._cutlass(a, a_scales, b, b_scales, "mxf4", 1.0, torch.bfloat16, None, told)
        assert len(clock) == measured
    assert configurations(calls)[-1] == SMALL


def test_nothing_is_measured_while_a_graph_is_captured(calls, clock, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    tune_once(*operands(), None, kind="mxf4", dtype=torch.bfloat16)
    assert not clock


def test_nothing_is_measured_of_fake_tensors(calls, clock):
    with FakeTensorMode():
        made = torch.ops.quartet.block_scaled_mm(*operands(), "mxf4", 1.0, torch.bfloat16, None, True)
    assert made.shape == (64, 64) and not clock


@pytest.mark.parametrize("sizes", ((0, 64, 64), (64, 64, 0)))
def test_nothing_is_measured_of_an_empty_product(calls, clock, sizes):
    tune_once(*operands(*sizes), None, kind="mxf4", dtype=torch.bfloat16)
    assert not clock


def test_nothing_is_measured_where_the_user_names_a_tile(calls, clock, monkeypatch):
    monkeypatch.setenv(selection.VARIABLE, LARGE.tile_name)
    tune_once(*operands(), None, kind="mxf4", dtype=torch.bfloat16)
    assert not clock


@pytest.mark.parametrize("error", (BuildError("no compiler"), torch.OutOfMemoryError("full"), OSError("read-only")))
def test_what_cannot_be_tuned_is_tried_once(calls, monkeypatch, caplog, error):
    def fail(run, device):
        tries.append(run)
        raise error

    tries = []
    monkeypatch.setattr(tuning, "microseconds", fail)
    for _ in range(2):
        tune_once(*operands(), None, kind="mxf4", dtype=torch.bfloat16)
    assert len(tries) == (3 if isinstance(error, BuildError) else 1)
    assert len(re.findall("mxf4 bf16 128x128x256 is not tuned: ", caplog.text)) == 1


def test_of_two_processes_the_first_decides(calls, clock):
    remember(product(), CPU, {LARGE: 1.0})
    tune(*operands(), kind="mxf4", replace=False)
    assert select(product(), CPU, 148) == LARGE
    tune(*operands(), kind="mxf4")
    assert select(product(), CPU, 148) == SMALL


@pytest.mark.parametrize(("options", "told"), [({"max_autotune": True}, True), ({}, False)])
def test_max_autotune_is_what_tells_the_op(options, told):
    model, x = linear()
    for gm in trace("sm_100a", model, x, policy="nvfp4", **options):
        products = gm.graph.find_nodes(op="call_function", target=block_scaled_ops.MM)
        assert products and {node.kwargs.get("tune", False) for node in products} == {told}


def test_the_modes_of_torch_compile_arrive():
    for mode, told in (("max-autotune", True), ("max-autotune-no-cudagraphs", True), ("reduce-overhead", False)):
        assert compat.option(Options.parse(mode).inductor, "max_autotune") is told
    assert not compat.option(Options.parse("max-autotune", {"max_autotune": False}).inductor, "max_autotune")
    with compat.inductor_config.patch(max_autotune=True):
        assert compat.option({}, "max_autotune")


# the clock

def test_the_time_is_the_median_between_events_after_a_flush(monkeypatch):
    stream, sizes = [], []
    device = torch.device("cuda", 0)
    times = iter([0.5] * 12 + [9.0] * 12 + [0.25])

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            stream.append("event")

        def elapsed_time(self, end):
            assert stream[-1] == "synchronised"
            return next(times)

    def empty(size, dtype, device):
        sizes.append(size)
        return SimpleNamespace(zero_=lambda: stream.append("flush"))

    class Guard:
        __init__ = __enter__ = __exit__ = lambda *arguments: None

    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=126 << 20))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(
        synchronize=lambda: stream.append("synchronised")))
    assert microseconds(lambda: stream.append("run"), device) == 500.0 and sizes == [4 * 126 << 20]
    assert stream == ["run"] * 3 + ["flush", "event", "run", "event"] * 25 + ["synchronised"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
class TestOnAnyDevice:
    def test_times_grow_with_the_work(self):
        device = torch.device("cuda", 0)
        small, large = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for n in (2048, 4096))
        of_small, of_large = (microseconds(lambda x=x: x @ x, device) for x in (small, large))
        assert 2 * 4096**3 / 5e15 < 1e-6 * of_large < 2 * 4096**3 / 2e13
        assert 3 < of_large / of_small < 16

    def test_launches_are_hidden_and_the_cache_is_cold(self):
        device = torch.device("cuda", 0)
        one, many = torch.zeros(1, device=device), torch.zeros(1 << 22, device=device)
        assert microseconds(one.zero_, device) < 15
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(5):
            many.sum()
        begin.record()
        for _ in range(200):
            many.sum()
        end.record()
        end.synchronize()
        hot = 1000 * begin.elapsed_time(end) / 200
        assert microseconds(many.sum, device) > 0.5 * hot
