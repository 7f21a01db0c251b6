"""Small convolutional networks: convolutions are Inductor's or, where a rule names them, products of ours."""

import os

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, relu

from quartet.backend import compile_graph
from quartet.kernels.spec import QuantSpec
from quartet.lowering.recipe.types import Gemm, Operand, Recipe
from quartet.options import Options
from quartet.policy import Policy
from quartet.runtime.capture import Capture

aten = torch.ops.aten
os.environ.setdefault("HF_HUB_OFFLINE", "1")
_MXFP8 = Operand(QuantSpec(element="e4m3", block=32, rule="ceil"))
MXFP8 = Recipe("custom-mxfp8", fprop=Gemm(_MXFP8, _MXFP8), dgrad=Gemm(_MXFP8, _MXFP8), wgrad=Gemm(_MXFP8, _MXFP8))
RECIPES = pytest.mark.parametrize("recipe, least", (("quartet", 0.4), ("fp8", 0.9), (MXFP8, 0.9)),
                                  ids=("quartet", "fp8", "mxfp8"))


class Residual(nn.Module):
    """Two 3×3 convolutions beside a 1×1 one."""

    def __init__(self, channels, out, stride):
        super().__init__()
        self.a = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.b = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.short = nn.Conv2d(channels, out, 1, stride, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(out) for _ in range(3))

    def forward(self, x):
        y = self.norms[1](self.b(relu(self.norms[0](self.a(x)))))
        return relu(y + self.norms[2](self.short(x)))


@pytest.fixture
def network():
    torch._dynamo.reset()
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), Residual(16, 32, 2), Residual(32, 64, 2),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))


def compiled(model, policy):
    records, capture = [], Capture()

    def backend(gm, inputs):
        return compile_graph(gm, inputs, Options(policy), inner_compile=capture, collect=records.extend)

    return torch.compile(model, backend=backend), records, capture


def test_convolutions_are_left_alone(network):
    model, records, capture = compiled(network, Policy("quartet").on("lm_head", "quartet"))
    model(torch.randn(8, 3, 16, 16)).square().mean().backward()
    assert {(r.fqn, r.op_class) for r in records if r.lowered} == {("5", "linear"), ("7", "lm_head")}
    left = [r for r in records if r.op_class == "conv"]
    assert {r.fqn for r in left} == {"0", *(f"{i}.{name}" for i in (1, 2) for name in ("a", "b", "short"))}
    assert [r.role for r in left].count("dgrad") == 6, "the image needs no gradient"
    assert {r.reason for r in left} == {"recipe 'quartet' leaves conv in high precision unless a rule names it"}
    targets = [node.target for gm in capture.graphs for node in gm.graph.nodes]
    assert targets.count(aten.convolution.default) == 7 and targets.count(aten.convolution_backward.default) == 7


def test_convolution_gradients_are_exact_where_nothing_is_quantised_after_them(network):
    trunk, x = network[:5], torch.randn(8, 3, 16, 16)
    plain = [g.clone() for g in torch.autograd.grad(trunk(x).square().mean(), list(trunk.parameters()))]
    model, records, _ = compiled(trunk, Policy("quartet"))
    ours = torch.autograd.grad(model(x).square().mean(), list(trunk.parameters()))
    assert records and not any(r.lowered for r in records)
    for a, b in zip(plain, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def train(run, model, steps=25):
    """Loss of each step on 32 images of 8 classes."""
    x, y = torch.randn(32, 3, 16, 16), torch.arange(32) % 8
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(steps):
        loss = cross_entropy(run(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_it_trains(network):
    model, records, _ = compiled(network, Policy("quartet"))
    losses = train(model, network)
    assert losses[0] > 1.9 and losses[-1] < 0.5 * losses[0], losses
    assert network[1].norms[0].num_batches_tracked == 25, "batch statistics are updated once a step"
    assert {r.role for r in records if r.fqn == "5" and r.lowered} == {"fprop", "dgrad", "wgrad"}


class Mixer(nn.Module):
    """A ConvNeXt block: depthwise 7×7, norm over channels, two 1×1 convolutions, a scaled residual."""

    def __init__(self, channels):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.up, self.down = nn.Conv2d(channels, 4 * channels, 1), nn.Conv2d(4 * channels, channels, 1)
        self.scale = nn.Parameter(torch.full((channels, 1, 1), 0.1))

    def forward(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x + self.scale * self.down(nn.functional.gelu(self.up(y)))


@pytest.fixture
def convnext():
    torch._dynamo.reset()
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 32, 2, 2), Mixer(32), nn.Conv2d(32, 64, 2, 2), Mixer(64),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 8))


NETWORKS = pytest.mark.parametrize("which", ("network", "convnext"))


@RECIPES
@NETWORKS
def test_quantised_convolutions_train(which, recipe, least, request):
    network = request.getfixturevalue(which)
    model, records, capture = compiled(network, Policy("quartet").on("conv", recipe))
    losses = train(model, network, 15)
    assert losses[-1] < 0.7 * losses[0], losses
    left = {r.fqn: r.reason for r in records if r.op_class == "conv" and not r.lowered}
    assert all("groups" in reason for reason in left.values())
    assert set(left) == (set() if which == "network" else {"1.depthwise", "3.depthwise"})
    grouped = sum(n.target is aten.convolution.default for gm in capture.graphs for n in gm.graph.nodes)
    assert grouped == len(left), "the others are products"


@RECIPES
@NETWORKS
def test_gradients_of_quantised_convolutions(which, recipe, least, request):
    """Through up to seven layers, in evaluation, where batch statistics do not amplify what rounding changes."""
    network, x = request.getfixturevalue(which).eval(), torch.randn(8, 3, 16, 16)
    weights = {name: p for name, p in network.named_parameters() if p.dim() == 4}
    plain = torch.autograd.grad(cross_entropy(network(x), torch.arange(8)), weights.values())
    model, _, _ = compiled(network, Policy(None).on("conv", recipe))
    torch.manual_seed(1)
    ours = torch.autograd.grad(cross_entropy(model(x), torch.arange(8)), weights.values())
    for name, a, b in zip(weights, ours, plain, strict=True):
        assert torch.cosine_similarity(a.flatten(), b.flatten(), 0) > least, name


@NETWORKS
def test_stochastic_gradients_of_convolutions_average_to_the_exact_ones(which, request):
    network, x = request.getfixturevalue(which).eval(), torch.randn(8, 3, 16, 16)
    weights = {name: p for name, p in network.named_parameters() if p.dim() == 4}
    plain = torch.autograd.grad(cross_entropy(network(x), torch.arange(8)), weights.values())
    model, records, _ = compiled(network, Policy(None).on("conv", "quartet", role=("dgrad", "wgrad")))
    draws = [torch.autograd.grad(cross_entropy(model(x), torch.arange(8)), weights.values()) for _ in range(8)]
    for name, a, b in zip(weights, map(sum, zip(*draws, strict=True)), plain, strict=True):
        assert torch.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.98, name
    assert {r.role for r in records if r.lowered} == {"dgrad", "wgrad"}


def huggingface(name):
    """A tiny model of transformers with its convolutions that are products, and those of several groups."""
    transformers = pytest.importorskip("transformers")
    torch._dynamo.reset()
    torch.manual_seed(0)
    if name == "resnet":
        config = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1], num_labels=4)
        return transformers.ResNetForImageClassification(config), 0
    config = transformers.ConvNextConfig(hidden_sizes=[32, 64], depths=[1, 1], num_stages=2, num_labels=4)
    return transformers.ConvNextForImageClassification(config), 2


@pytest.mark.parametrize("name", ("resnet", "convnext"))
def test_models_of_transformers_train(name):
    network, depthwise = huggingface(name)
    model, records, _ = compiled(network, Policy("quartet").on("conv", "quartet"))
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    losses = []
    for _ in range(12):
        loss = model(pixel_values=x, labels=y).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses
    convolutions = sum(isinstance(m, nn.Conv2d) for m in network.modules())
    found = {r.fqn: r.lowered for r in records if r.op_class == "conv" and r.role == "fprop"}
    assert len(found) == convolutions and list(found.values()).count(False) == depthwise
