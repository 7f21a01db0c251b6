"""What autograd asks beyond one backward: second derivatives, and weights that changed since the forward."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from direct_models import net, task, wrapped  # noqa: E402

from quartet import direct  # noqa: E402


def layer(bits="ternary", activations=None, paper=False, dtype=torch.float64):
    torch.manual_seed(0)
    return direct.convert(nn.Sequential(nn.Linear(12, 7)), bits, activations=activations, paper=paper).to(dtype)[0]


def plain(low):
    """The ``nn.Linear`` of the same numbers."""
    twin = nn.Linear(12, 7).to(low.weight.dtype)
    twin.weight.data, twin.bias.data = low.weight.dequantize().to(low.weight.dtype), low.bias.detach().clone()
    return twin


def x_of(shape=(3, 5, 12), seed=1, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("bits", ["ternary", 4, 8])
@pytest.mark.parametrize("of", ["the input's gradient", "the weight's gradient", "both"])
def test_second_and_third_derivatives_are_those_of_the_linear_layer(of, bits, paper):
    low = layer(bits, paper=paper)
    found = []
    for f in (low, plain(low)):
        x = x_of()
        wanted = {"the input's gradient": (x,), "the weight's gradient": (f.weight,), "both": (x, f.weight, f.bias)}[of]
        loss = f(x).sin().square().sum()
        first = torch.autograd.grad(loss, wanted, create_graph=True)
        second = torch.autograd.grad(sum(g.cos().sum() for g in first), (x, f.weight, f.bias), create_graph=True)
        third = torch.autograd.grad(sum(g.square().sum() for g in second), (x, f.weight))
        found.append((*first, *second, *third))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_penalty_of_the_inputs_gradient_under_autocast():
    low = layer(8, dtype=torch.float32)
    found = []
    for f in (low, plain(low)):
        x = x_of(dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            out = f(x)
        grad, = torch.autograd.grad(out.float().square().sum(), x, create_graph=True)
        (grad.norm(dim=-1) - 1).square().sum().backward()
        found.append(f.weight.grad)
    torch.testing.assert_close(*found, rtol=0.05, atol=0.05 * found[1].abs().max().item())


@pytest.mark.parametrize("make", [lambda: layer(8, "int8"), lambda: direct.bitnet(nn.Sequential(nn.Linear(12, 7)))[0]],
                         ids=["int8", "bitnet"])
@pytest.mark.parametrize("loss", [torch.sum, lambda y: y.square().sum()], ids=["linear", "quadratic"])
def test_what_has_no_second_derivative_says_so(make, loss):
    """Where the loss is linear too: the gradient of the input is then the weights alone."""
    f = make()
    x = x_of(dtype=f.weight.dtype)
    first, = torch.autograd.grad(loss(f(x)), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives .* are not defined"):
        first.square().sum().backward()
    (found,), (expected,) = (torch.autograd.grad(f(x).square().sum(), f.weight, create_graph=g) for g in (True, False))
    torch.testing.assert_close(found.detach(), expected)


@pytest.mark.parametrize("activations", ["int8", None])
@pytest.mark.parametrize("change", ["step", "load", "copy"])
def test_a_weight_that_changed_since_the_forward_is_noticed(change, activations):
    model = net(8, activations=activations)
    optimizer, other = wrapped(model), copy.deepcopy(model)
    x, _ = task()
    model(x).sum().backward()
    out = model(x.requires_grad_())
    if change == "step":
        optimizer.step()
    elif change == "load":
        model.load_state_dict(other.state_dict())
    else:
        with torch.no_grad():
            model.up.weight.copy_(other.up.weight)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    model(x).sum().backward()


def test_checkpointed_layers_take_the_weights_of_their_own_forward():
    model = net(8)
    optimizer = wrapped(model)
    for _ in range(2):
        torch.utils.checkpoint.checkpoint(model, task()[0], use_reentrant=False).sum().backward()
        optimizer.step()


def test_data_is_taken_over_whole():
    model, other = net(8), net(8, seed=1)
    model.up.weight.data = other.up.weight.data
    assert torch.equal(model.up.weight.dequantize(), other.up.weight.dequantize())
    with pytest.raises(TypeError, match="LowBitWeight.of"):
        model.up.weight.data = torch.zeros(64, 32)
