"""Layers whose operands the model quantises itself are left alone, with the reason, unless a rule names them."""

import pytest
import torch
from harness import ALL, compile_eager, step
from torch import nn

from quartet import Policy, explain

torchao = pytest.importorskip("torchao")
WIDTH = 64


class Rounded(torch.autograd.Function):
    """x on a grid of scales for groups of 32, and its gradient as it is."""

    @staticmethod
    def forward(ctx, x):
        groups = x.unflatten(-1, (-1, 32))
        scale = groups.abs().amax(-1, keepdim=True) / 7
        return (torch.clamp(torch.round(groups / scale), -8, 7) * scale).flatten(-2)

    @staticmethod
    def backward(ctx, grad):
        return grad


def straight_through(x):
    return x + (Rounded.apply(x.detach()) - x).detach()


def cast(x, dtype=torch.float8_e4m3fn):
    scale = x.detach().abs().amax() / 400
    return x + ((x / scale).to(dtype).to(x.dtype) * scale - x).detach()


def ternary(x):
    scale = x.detach().abs().mean()
    return x + (torch.clamp(torch.round(x / scale), -1, 1) * scale - x).detach()


class Layer(nn.Linear):
    def __init__(self, of_weight=None, of_input=None):
        super().__init__(WIDTH, WIDTH, bias=False)
        self.of_weight, self.of_input = of_weight, of_input

    def forward(self, x):
        weight = self.weight if self.of_weight is None else self.of_weight(self.weight)
        return nn.functional.linear(x if self.of_input is None else self.of_input(x), weight)


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.before, self.layer, self.after = nn.Linear(WIDTH, WIDTH), layer, nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.after(torch.tanh(self.layer(torch.relu(self.before(x)))))


def outcome(layer, policy="fp8"):
    torch.manual_seed(0)
    model, x = Net(layer), torch.randn(32, WIDTH, requires_grad=True)
    compiled, backend = compile_eager(model, policy, fullgraph=False)
    step(compiled, model, (x,))
    return backend


@pytest.mark.parametrize("layer, what", [
    (Layer(Rounded.apply), "W"), (Layer(straight_through), "W"), (Layer(cast), "W"), (Layer(ternary), "W"),
    (Layer(None, Rounded.apply), "X"), (Layer(None, cast), "X"), (Layer(cast, cast), "W"),
    (Layer(lambda w: torch.fake_quantize_per_channel_affine(
        w, torch.full((WIDTH,), 0.01), torch.zeros(WIDTH, dtype=torch.int32), 0, -8, 7)), "W"),
], ids=["rounded", "straight through", "fp8", "ternary", "input", "fp8 input", "both", "fake_quantize"])
def test_a_layer_that_quantises_is_left_alone(layer, what):
    backend = outcome(layer)
    assert backend.lowered() == {"before": ALL, "after": ALL}
    assert all(f"{what} is quantised by the model itself" in r.reason and "unless a rule names it" in r.reason
               for r in backend.records if r.fqn == "layer")
    named = outcome(layer, Policy("fp8").on("layer", "fp8"))
    assert named.lowered()["layer"] >= {"fprop"}


@pytest.mark.parametrize("between", [
    torch.relu, lambda x: x * torch.sigmoid(x), lambda x: nn.functional.dropout(x, 0.5), lambda x: x.clamp(-3, 3) / 2,
    lambda x: torch.where(x > 0, x, 0.1 * x), lambda x: x.to(torch.bfloat16).to(x.dtype)])
def test_what_is_no_quantisation(between):
    backend = outcome(Layer(None, between))
    assert "layer" in backend.lowered()


def test_bytes_that_the_model_reads_are_data():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    compiled, backend = compile_eager(lambda x: model(x.float() / 255), "fp8")
    compiled(torch.randint(256, (32, WIDTH), dtype=torch.uint8))
    assert not any("quantised by the model" in r.reason for r in backend.records)


def reasons(model, dtype):
    found = explain(model, torch.randn(32, WIDTH, dtype=dtype), options={"policy": "fp8"})
    return {r.kernel for r in found if r.fqn == "0"}, {r.reason for r in found if r.fqn == "0"}


def sequential(dtype=torch.float32):
    return nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.ReLU(), nn.Linear(WIDTH, WIDTH)).to(dtype)


@pytest.mark.parametrize("activations", [False, True])
def test_torchaos_quantisation_aware_training(activations):
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    model = sequential()
    of_x = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False) if activations else None
    quantize_(model, QATConfig(activation_config=of_x, step="prepare",
                               weight_config=IntxFakeQuantizeConfig(torch.int4, group_size=32)))
    kernels, why = reasons(model, torch.float32)
    assert kernels == {None} and all("quantised by the model itself" in reason for reason in why)


@pytest.mark.parametrize("emulate", [False, True])
def test_torchaos_float8_training(emulate):
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    model = convert_to_float8_training(sequential(torch.bfloat16), config=Float8LinearConfig(emulate=emulate))
    found = explain(model, torch.randn(32, WIDTH, dtype=torch.bfloat16), options={"policy": "fp8"}, target="sm_90")
    forward = [r for r in found if r.role == "fprop"]
    assert len(forward) == 2 and not any(r.lowered for r in found)
    assert all("quantised by the model itself" in r.reason for r in forward)


def test_torchaos_weights_of_codes():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = sequential(torch.bfloat16).requires_grad_(False)
    quantize_(model, Int8WeightOnlyConfig())
    kernels, why = reasons(model, torch.bfloat16)
    assert kernels == {None} and all("to int8" in reason for reason in why)
