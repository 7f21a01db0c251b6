"""When histories of delayed scaling advance: once an optimizer step, whatever else runs."""

import pytest
import torch
from harness import compile_eager
from models import MLP
from torch import nn
from torch.utils.checkpoint import checkpoint

import quartet


def histories(model):
    """key → (pending, history without its empty entries)."""
    rows = {key: entry["amax"].tolist() for key, entry in quartet.state_dict(model)["delayed"].items()}
    return {key: (row[0], [h for h in row[1:] if h]) for key, row in rows.items()}


def forward(compiled, size):
    compiled(torch.full((40, 64), size)).sum().backward()


def linear():
    layer = nn.Linear(64, 48, bias=False)
    return layer, compile_eager(layer, "fp8-delayed")[0]


def test_micro_batches_of_the_first_step_count_once():
    layer, compiled = linear()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    forward(compiled, 3.0), forward(compiled, 2.0)
    assert histories(layer)["weight.x"] == (3.0, [])
    optimizer.step()
    assert histories(layer)["weight.x"] == (0.0, [3.0])


def test_without_an_optimizer_each_forward_advances():
    layer, compiled = linear()
    forward(compiled, 3.0), forward(compiled, 2.0), forward(compiled, 4.0)
    assert histories(layer)["weight.x"] == (4.0, [2.0, 3.0])


def test_a_forward_without_a_backward_leaves_nothing():
    layer, compiled = linear()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    forward(compiled, 3.0)
    compiled(torch.full((40, 64), 9.0))
    optimizer.step()
    compiled(torch.full((40, 64), 8.0))
    assert histories(layer)["weight.x"] == (0.0, [3.0])


@pytest.mark.parametrize(("optimizer", "reentrant"), [
    (torch.optim.SGD, False), (torch.optim.SGD, True), (None, False)])
def test_a_checkpoint_around_what_is_compiled_records_once(optimizer, reentrant):
    """And what it computes again is scaled as it was."""
    found = []
    for again in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = MLP()
        compiled = compile_eager(model, "fp8-delayed")[0]
        steps = optimizer and optimizer(model.parameters(), 0.1)
        for size in (1.0, 3.0, 2.0):
            x = torch.full((40, 64), size, requires_grad=True)
            y = checkpoint(compiled, x, use_reentrant=reentrant) if again else compiled(x)
            y.square().sum().backward()
            if steps:
                steps.step()
        found.append((model.up.weight.grad, histories(model)))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]
    assert len(found[0][1]["up.weight.x"][1]) == (3 if optimizer else 2)


def test_frozen_weights_advance_with_those_of_their_call():
    model = MLP()
    model.up.requires_grad_(False)
    optimizer = torch.optim.SGD(model.down.parameters(), 0.1)
    compiled, _ = compile_eager(model, "fp8-delayed")
    for sizes in ((1.0, 3.0), (2.0, 1.0)):
        for size in sizes:
            forward(compiled, size)
        optimizer.step()
    assert histories(model)["up.weight.x"] == (0.0, [2.0, 3.0])


def test_an_optimizer_advances_its_own_weights():
    model = MLP()
    first, second = (torch.optim.SGD(part.parameters(), 0.1) for part in (model.up, model.down))
    compiled, _ = compile_eager(model, "fp8-delayed")
    forward(compiled, 3.0)
    first.step()
    forward(compiled, 1.0)
    second.step()
    assert histories(model)["up.weight.x"] == (1.0, [3.0]) and len(histories(model)["down.weight.x"][1]) == 1


def test_optimizers_that_step_in_backward():
    model = MLP()
    for parameter in model.parameters():
        optimizer = torch.optim.SGD([parameter], 0.1)
        parameter.register_post_accumulate_grad_hook(lambda _, step=optimizer.step: step())
    compiled, _ = compile_eager(model, "fp8-delayed")
    for size in (3.0, 1.0, 2.0):
        forward(compiled, size)
    pending, history = histories(model)["up.weight.x"]
    assert (pending, history) == (0.0, [2.0, 1.0, 3.0])
    assert all(len(history) == 3 and pending == 0 for pending, history in histories(model).values())


def test_a_step_that_fails_stops_no_other_optimizer():
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("no")

    layer, compiled = linear()
    with pytest.raises(RuntimeError, match="no"):
        Failing(layer.parameters(), 0.1).step()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    forward(compiled, 2.0)
    optimizer.step()
    assert histories(layer)["weight.x"] == (0.0, [2.0])


def test_a_step_inside_of_a_step_and_one_that_fails():
    class Outer(torch.optim.SGD):
        def step(self, closure=None):
            inner.step()
            assert histories(layer)["weight.x"] == (size, []), "it has not ended"
            if size == 1.0:
                raise RuntimeError("no")
            return super().step()

    layer, compiled = linear()
    inner, outer = torch.optim.SGD(layer.parameters(), 0.1), Outer(layer.parameters(), 0.1)
    size = 1.0
    forward(compiled, size)
    with pytest.raises(RuntimeError, match="no"):
        outer.step()
    size = 2.0
    forward(compiled, size)
    outer.step()
    assert histories(layer)["weight.x"] == (0.0, [2.0])
