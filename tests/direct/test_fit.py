"""States of other shapes are refused before a step or a load writes anything; numbers that are not finite show."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from direct_models import BITS, assert_same, net, stored, task, train, wrapped  # noqa: E402

from quartet import direct, optim  # noqa: E402

INNER = {"torch AdamW": torch.optim.AdamW, "torch SGD": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9),
         "torch Adagrad": torch.optim.Adagrad, "AdamW": optim.AdamW, "Lion": optim.Lion,
         "SGD": lambda p, lr: optim.SGD(p, lr, momentum=0.9)}


def grown(model):
    """The model with 96 instead of 64 features inside."""
    torch.manual_seed(2)
    other = direct.convert(nn.Sequential(nn.Linear(32, 96)), model.up.weight.bits)[0]
    model.up.weight.data, model.up.bias.data = other.weight.data, other.bias.data
    model.down.weight.data = direct.convert(nn.Sequential(nn.Linear(96, 64)), model.down.weight.bits)[0].weight.data
    return model


BOTH = "(?s)" + ".*".join(re.escape(shape) for shape in ("[96, 32]", "[64, 32]"))


@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("inner", INNER)
def test_a_loaded_state_of_another_shape(inner, feedback):
    ours, theirs = net(8), grown(net(8))
    optimizers = [wrapped(m, INNER[inner], feedback=feedback) for m in (ours, theirs)]
    for model, optimizer in zip((ours, theirs), optimizers, strict=True):
        train(model, optimizer, 1)
    before = stored(ours)
    with pytest.raises(ValueError, match=BOTH):
        optimizers[0].load_state_dict(optimizers[1].state_dict())
    assert_same(before, stored(ours))
    train(ours, optimizers[0], 1)


@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("inner", INNER)
def test_a_weight_that_got_another_shape(inner, feedback):
    model = net(8)
    optimizer = wrapped(model, INNER[inner], feedback=feedback)
    train(model, optimizer, 2)
    grown(model)
    model(task()[0]).sum().backward()
    before = stored(model)
    with pytest.raises(ValueError, match="(?s)parameter 0 of group 0.*" + re.escape("[64, 32]") + ".*"
                       + re.escape("[96, 32]")):
        optimizer.step()
    assert_same(before, stored(model))
    assert optimizer.param_groups[0]["direct_step"] == 2


def test_factored_states_are_their_optimizers_own():
    model = net(8)
    train(model, wrapped(model, torch.optim.Adafactor), 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("inner", ["torch AdamW", "torch SGD", "AdamW", "Lion"])
@pytest.mark.parametrize("options", [{}, {"rescale": None}, {"rescale_every": 1}, {"feedback": True}])
def test_a_gradient_that_is_not_finite_shows(options, inner, bad):
    model = net(8)
    optimizer = wrapped(model, INNER[inner], **options)
    train(model, optimizer, 1)
    model(task()[0]).sum().backward()
    model.up.weight.grad[3, 5] = bad
    optimizer.step()
    lion = inner == "Lion" and bad == float("inf")  # whose step is the sign
    assert model.up.weight.scale.isnan().tolist() == [row == 3 and not lion for row in range(64)]
    assert torch.isfinite(model.down.weight.scale).all()
    optimizer.zero_grad()
    assert lion or not torch.isfinite(torch.tensor(train(model, optimizer, 2))).any()


@pytest.mark.parametrize("bits", BITS)
def test_a_gradient_that_is_not_finite_shows_under_the_papers_rule(bits):
    model = net(bits, paper=True)
    optimizer = wrapped(model)
    model(task()[0]).sum().backward()
    model.up.weight.grad[3, 5] = float("nan")
    optimizer.step()
    assert not torch.isfinite(model(task()[0])).any()
