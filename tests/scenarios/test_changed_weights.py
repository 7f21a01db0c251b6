"""A weight that is written to between forward and backward: an error in backward, as without the backend."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from harness import assert_same, compile_eager, compile_plain, step
from models import MLP
from torch import nn

from quartet import Policy

MESSAGE = "modified by an inplace operation"


class Chunked(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(96, 64) / 8)

    def forward(self, x):
        a, b, c = (F.linear(x, w) for w in self.weight.chunk(3))
        return torch.tanh(a) * b + c


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 32, 64, dtype=torch.bfloat16) / 8)

    def forward(self, x):
        return F.grouped_mm(x.bfloat16(), self.weight.transpose(1, 2), offs=torch.tensor([3, 8], dtype=torch.int32))


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(32, 64, 1, bias=False)

    def forward(self, x):
        return self.conv(x.reshape(1, 32, 4, -1))


def written_between(model, compiled, x, surroundings=contextlib.nullcontext):
    """The input's gradient after every weight has been written to between forward and backward."""
    x = x.clone().requires_grad_()
    with surroundings():
        y = compiled(x)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(1.5)
    y.float().square().sum().backward()
    return x.grad


@pytest.mark.parametrize("policy", ["quartet", "tetrajet", "nvfp4", "fp8", "fp8-delayed", "fp8-trillion", "int8",
                                    "fp4-dge", "tetrajet-ema", "bitnet"])
def test_it_is_an_error_under_every_recipe(policy):
    model = MLP()
    compiled, backend = compile_eager(model, policy)
    with pytest.raises(RuntimeError, match=MESSAGE):
        written_between(model, compiled, torch.randn(40, 64))
    assert backend.lowered()
    step(compiled, model, [torch.randn(40, 64, requires_grad=True)])


@pytest.mark.parametrize("model", [Chunked, Experts, Convolution])
def test_it_is_an_error_for_every_kind_of_weight(model):
    model, x = model(), torch.randn(8, 64)
    compiled, backend = compile_eager(model, Policy("quartet").on("*", "quartet"))
    for run in (compile_plain(model), compiled):
        with pytest.raises(RuntimeError, match=MESSAGE):
            written_between(model, run, x)
    assert backend.lowered()


def test_a_cast_weight_may_be_written_to():
    """Autograd keeps the cast, and so do the codes that were made of it."""
    model, x = MLP(), torch.randn(40, 64)
    state = {name: t.clone() for name, t in model.state_dict().items()}

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    written_between(model, compile_plain(model), x, autocast)
    model.load_state_dict(state)
    compiled, _ = compile_eager(model)
    torch.manual_seed(0)
    got = written_between(model, compiled, x, autocast)
    model.load_state_dict(state)
    torch.manual_seed(0)
    x.requires_grad_()
    with autocast():
        y = compiled(x)
    y.float().square().sum().backward()
    assert torch.equal(got, x.grad)


def test_a_weight_that_no_gradient_passes_may_be_written_to():
    layer = nn.Linear(64, 32)
    compiled, backend = compile_eager(layer)
    for run in (compile_plain(layer), compiled):
        y = run(torch.randn(8, 64))
        with torch.no_grad():
            layer.weight.mul_(1.5)
        y.sum().backward()
    assert backend.lowered()


def test_a_tensor_that_is_put_into_a_weight_counts_from_the_next_forward_on():
    """As in eager mode; ``torch.compile`` without us takes it in backward."""
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), torch.randn(32, 64)
    compiled, _ = compile_eager(model, "fp8")
    found = []
    for replaced in (False, True):
        loss = compiled(x).square().sum()
        if replaced:
            model[2].weight.data = torch.zeros(64, 64)
        model.zero_grad()
        loss.backward()
        found.append(model[0].weight.grad.clone())
    assert torch.equal(*found) and found[0].any()
    assert torch.equal(compiled(x), model[2].bias.expand(32, 64))


def test_micro_batches_are_checked_too():
    """Also where forward has read the codes that another one had made."""
    model = MLP()
    compiled, _ = compile_eager(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        for _ in range(2):
            compiled(torch.randn(8, 64)).square().mean().backward()
        optimizer.step()
    losses = [compiled(torch.randn(8, 64)).square().mean() for _ in range(3)]
    losses[0].backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=MESSAGE):
        losses[2].backward()


@pytest.mark.parametrize("policy", ["quartet", "fp8", "int8", "tetrajet"])
def test_nothing_else_is_kept_for_it(policy):
    runs = []
    for disabled in ((), ("unchanged",)):
        torch.manual_seed(0)
        model = MLP()
        compiled, backend = compile_eager(model, policy, disable_passes=disabled)
        runs.append((step(compiled, model, [torch.randn(40, 64, requires_grad=True)]), backend.capture.saved_bytes,
                     [str(n.target) for gm in backend.capture.graphs for n in gm.graph.nodes
                      if n.op == "call_function" and "_assert" not in str(n.target)]))
    assert_same(runs[0][0], runs[1][0])
    assert runs[0][1:] == runs[1][1:]
