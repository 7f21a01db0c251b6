"""What backward reads of a joint graph that is not divided, against the same graph divided: the rarer ways of ending."""

from types import SimpleNamespace

import pytest
import torch
from torch._functorch import config as functorch
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._library.fake_class_registry import FakeScriptObject
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule

from quartet.lowering.ir.graph import Builder, aten
from quartet.passes.residuals.trial import Cut, Division, Trial, copy_of

wait = torch.ops._c10d_functional.wait_tensor.default


def ignores_its_gradient(forward, backward, x, gradient):
    """The last function's gradient is made of what it has kept alone, before any node reads a gradient."""
    y = forward(aten.mm.default, x, x)
    by_itself = backward(aten.exp.default, y)
    return [forward(aten.sin.default, y), x], [backward(aten.mul.Tensor, gradient, x), by_itself]


def hands_its_gradient_on(forward, backward, x, gradient):
    """The only reader of a gradient is the end; what backward asserts is dropped."""
    y = forward(aten.mm.default, x, x)
    backward(aten._assert_async.default, backward(aten.all.default, y))
    return [forward(aten.sin.default, y), x], [backward(aten.exp.default, y), gradient]


def waits_once_more(forward, backward, x, gradient):
    """What forward waits for, backward would wait for again, and read no result of it."""
    shown = forward(aten.sin.default, forward(wait, x))
    return [shown, shown], [backward(aten.mul.Tensor, gradient, gradient)]


def has_a_mesh(forward, backward, x, gradient):
    """An input that is no tensor is handed on by both halves, as the mesh of a DTensor."""
    mesh = x.graph.find_nodes(op="placeholder")[1]
    y = forward(aten.mm.default, x, x)
    return [forward(aten.sin.default, y), mesh], [backward(aten.mul.Tensor, gradient, forward(aten.cos.default, y)), mesh]


def joint(function):
    graph = Graph()
    x, mesh, gradient = map(graph.placeholder, ("primals_1", "primals_2", "tangents_1"))
    mesh.meta["val"] = FakeScriptObject(None, "mesh", None)
    with FakeTensorMode():
        for node in (x, gradient):
            node.meta["val"] = torch.empty(8, 8)
    end = graph.output(())
    results, gradients = function(*(Builder(graph, x, end, backward=half) for half in (False, True)), x, gradient)
    end.args = ((*results, *gradients),)
    end.meta["desc"] = [SimpleNamespace(), SimpleNamespace(), *(SimpleNamespace(grad_of=None) for _ in gradients)]
    return GraphModule(torch.nn.Module(), graph)


def known(divided):
    return [(kept.made.name, {node.name for node in divided.seen.readers(kept.read) if node.op != "output"},
             {node.name for node in divided.seen.recomputed(kept.read)}) for kept in divided.kept]


@pytest.mark.parametrize("function", [ignores_its_gradient, hands_its_gradient_on, waits_once_more, has_a_mesh])
@pytest.mark.parametrize("budget", [0.0, 1.0])  # by 0 all inputs are saved, read or not
def test_it_reads_what_a_division_reads(function, budget):
    gm, config = joint(function), SimpleNamespace(partition=min_cut_rematerialization_partition, weights={})
    with functorch.patch(activation_memory_budget=budget):
        divided = Trial(copy_of(gm), config).divided()
        assert isinstance(divided, Cut)
        assert known(divided) == known(Division(*Trial(copy_of(gm), config)._ask(config.partition), 2))
