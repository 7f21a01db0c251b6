"""Kernels compiled while Inductor generates code: which calls of a graph, with what arguments, and that none is run."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from quartet.backend import make_pipeline
from quartet.kernels.launcher import only_compiles
from quartet.lowering.ir import ahead
from quartet.lowering.ir.ahead import Absent, compile_ahead
from quartet.lowering.ir.op import op, op_of
from quartet.lowering.ir.ops.fp8 import AMAX_OF_EACH, AMAX_OF_WEIGHTS
from quartet.options import Options
from quartet.passes import pipeline
from quartet.runtime.devices import Target


@pytest.fixture(scope="module")
def probe():
    """An op of two providers for GPUs, the first of which is replayed, and the calls of what compiles ahead."""
    seen = []

    @op(fake=lambda x, xs, site, parameter=None: x.new_empty(x.shape), name="ahead_probe")
    def reference(x: Tensor, xs: list[Tensor], site: int, parameter: Tensor | None = None) -> Tensor:
        raise AssertionError("nothing is computed")

    @reference.provider("replayed", "cuda", replayed=True, owner="parameter")
    def replayed(x: Tensor, xs: list[Tensor], site: int, parameter: Tensor | None = None) -> Tensor:
        seen.append((only_compiles(), x, xs, site, parameter))
        return x.new_empty(x.shape[::-1], dtype=torch.uint8).t()

    @reference.provider("kept", "cuda")
    def kept(x: Tensor, xs: list[Tensor], site: int, parameter: Tensor | None = None) -> Tensor:
        raise AssertionError("it may do more than launch")

    yield reference, seen
    for provider in reference.providers[:-1]:
        reference.withdraw(provider.name)


def graph_of(*calls, device="cuda"):
    """A graph of calls, each (target, rows, site), of tensors of one device."""
    graph = torch.fx.Graph()
    with FakeTensorMode():
        for i, (target, rows, site) in enumerate(calls):
            x = graph.placeholder(f"x{i}")
            x.meta["val"] = torch.empty(rows, 64, dtype=torch.bfloat16, device=device)
            node = graph.call_function(target, (x, [x, x], site, x))
            node.meta["val"] = torch.empty_like(x.meta["val"])
    graph.output(())
    return graph


@pytest.fixture
def compiled(probe, monkeypatch):
    monkeypatch.setattr(Target, "of", classmethod(lambda cls, device: Target.named("h200")))
    _, seen = probe
    seen.clear()

    def compiled(graph):
        for thread in compile_ahead(graph):
            thread.join(20)
        return seen

    return compiled


def test_each_kind_of_call_is_run_once_for_tensors_without_memory(probe, compiled):
    op, _ = probe
    seen = compiled(graph_of((op.overload, 32, 3), (op.overload, 32, 5), (op.overload, 48, 7), (op.overload, 32, 16)))
    assert sorted((x.shape[0], site) for _, x, _, site, _ in seen) == [(32, 3), (32, 16), (48, 7)]
    for only, x, xs, _, parameter in seen:
        assert only and parameter is None
        assert all(type(each) is Absent and each.is_cuda and each.dtype is torch.bfloat16 for each in (x, *xs))
        assert x.data_ptr() == 0 and x.stride() == (64, 1)
    assert not only_compiles()


def test_what_is_made_of_an_absent_tensor_is_absent():
    x = Absent(torch.empty(4, 6, device="meta"), torch.device("cuda", 1))
    made = [x.t(), x.new_zeros(3, dtype=torch.uint8).view(torch.float8_e4m3fn), *x.split(2),
            torch.clone(x.t(), memory_format=torch.contiguous_format)]
    assert all(type(each) is Absent and each.device == x.device and each.data_ptr() == 0 for each in made)
    assert made[0].stride() == (1, 6) and made[-1].stride() == (4, 1) and made[1].dtype is torch.float8_e4m3fn


def test_what_may_do_more_than_launch_is_left_alone(probe, compiled):
    op, _ = probe
    assert compiled(graph_of((op.overload_of(op.providers[1]), 32, 3))) == []


def test_a_cpu_has_nothing_compiled_ahead(probe, compiled):
    op, _ = probe
    assert compiled(graph_of((op.overload, 32, 3), device="cpu")) == []


def test_symbolic_sizes_are_left_for_the_launch(probe, compiled):
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    op, _ = probe
    graph = graph_of((op.overload, 32, 3))
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        rows = mode.shape_env.create_unbacked_symint()
        graph.find_nodes(op="placeholder")[0].meta["val"] = torch.empty(rows, 64, device="cuda")
    assert compiled(graph) == []


def test_one_that_fails_keeps_no_other_from_being_compiled(probe, compiled, monkeypatch):
    op, seen = probe
    made = ahead.Absent.__new__

    def failing(cls, layout_only, device):
        if layout_only.shape[0] == 48:
            raise RuntimeError("no")
        return made(cls, layout_only, device)

    monkeypatch.setattr(Absent, "__new__", failing)
    compiled(graph_of((op.overload, 48, 3), (op.overload, 32, 3)))
    assert [x.shape[0] for _, x, *_ in seen] == [32]


def test_magnitudes_that_are_kept_are_compiled_as_those_that_are_not():
    found, launched = op_of(AMAX_OF_WEIGHTS), op_of(AMAX_OF_EACH)
    assert found.ahead(found.overload, Target.named("h200")) is launched.ahead(launched.overload, Target.named("h200"))


@pytest.mark.parametrize(("options", "wanted"), [
    ({}, True), ({"target": "h200"}, False), ({"triton.cudagraphs": True}, False)])
def test_only_what_will_be_launched_here_outside_of_graphs_is_compiled_ahead(options, wanted, monkeypatch):
    begun = []
    monkeypatch.setattr(pipeline, "compile_ahead", begun.append)
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(4, 4, device="meta")
    graph.output((x,))
    gm = torch.fx.GraphModule(torch.nn.Module(), graph)
    parsed = Options.parse(options={k: v for k, v in options.items() if k != "target"}, passes=pipeline.OPTIONAL)
    if "target" in options:
        parsed = replace(parsed, target=Target.named(options["target"]))
    make_pipeline(gm, [torch.zeros(4, 4)], parsed, ahead=True)(gm.graph)
    make_pipeline(gm, [torch.zeros(4, 4)], parsed)(gm.graph)
    assert begun == [gm.graph] * wanted
