"""``check="finite"``: an infinite input, a learning rate too high, an overflow that only FP8 has, and none of them."""

import copy
import math

import pytest
import torch
from harness import compile_eager
from torch import nn
from torch.nn.functional import relu

from quartet.inspect import Inspector, NotFinite, finite


class MLP(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.up, self.mid, self.down = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return self.down(relu(self.mid(relu(self.up(x)))))


def train(policy, inputs, lr=0.01, model=None, loss=None, **options):
    model = model or MLP()
    compiled, _ = compile_eager(model, policy, check="finite", **options)
    optimizer = torch.optim.SGD(model.parameters(), lr)
    for x in inputs:
        optimizer.zero_grad()
        out = compiled(x)
        (out.square().mean() if loss is None else loss(out)).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("policy", ["quartet", "fp8", "bf16"])
def test_a_run_in_which_all_is_finite(policy):
    train(policy, torch.randn(4, 64, 32))
    finite()


@pytest.mark.parametrize("policy", ["quartet", "fp8", "bf16"])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_an_input_that_is_not_finite(policy, bad):
    inputs = torch.randn(4, 64, 32)
    inputs[2, 7, 5] = bad
    model = MLP()
    with pytest.raises(NotFinite, match="step 2: fprop of up is the first product with an operand that .* finite: X$"):
        train(policy, inputs, model=model)
    assert all(torch.isfinite(p).all() for p in model.parameters()), "the optimizer has not stepped"


def test_a_gradient_that_is_not_finite():
    with pytest.raises(NotFinite, match=r"step 0: (w|d)grad of down is the first product .* not finite: E$"):
        train("fp8", torch.randn(2, 64, 32), loss=lambda out: (out - out.detach()).abs().sum().sqrt())


def test_a_learning_rate_too_high():
    with pytest.raises(NotFinite, match="step [1-9]"):
        train("bf16", torch.randn(12, 64, 32), lr=1e18)


def test_an_overflow_that_only_fp8_has():
    """The product of the codes, times the scale of X, exceeds fp32 before the scale of W brings it back."""
    inputs, model = torch.randn(2, 64, 32), MLP()
    inputs[1] *= 3e36
    with torch.no_grad():
        model.up.weight.mul_(1e-36)
    train("bf16", inputs, lr=0.0, model=model)
    torch._dynamo.reset()
    with pytest.raises(NotFinite, match="step 1: fprop of up is the first product whose result is not finite. Its "):
        train("fp8", inputs, lr=0.0, model=copy.deepcopy(model))


def test_layers_are_named_in_a_step_without_an_optimizer():
    model = MLP()
    compiled, _ = compile_eager(model, "fp8", check="finite", inspect=(inspector := Inspector()))
    with torch.no_grad():
        model.mid.weight[3, 3] = math.nan
    compiled(torch.randn(64, 32)).sum().backward()
    with pytest.raises(NotFinite, match="fprop of mid .*: W"):
        inspector.recorder.raise_if_not_finite()


def test_evaluation_is_looked_at():
    model = MLP()
    compiled, _ = compile_eager(model, "fp8", check="finite")
    with torch.no_grad():
        compiled(torch.full((64, 32), math.inf))
    with pytest.raises(NotFinite, match="fprop of up"):
        finite()
