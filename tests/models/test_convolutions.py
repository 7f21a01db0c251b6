"""A small residual network: its convolutions are Inductor's, its classifier is the policy's, and it learns."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, relu

from quartet.backend import compile_graph
from quartet.options import Options
from quartet.policy import Policy
from quartet.runtime.capture import Capture

aten = torch.ops.aten


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
    model, records, capture = compiled(network, Policy("quartet"))
    model(torch.randn(8, 3, 16, 16)).square().mean().backward()
    assert {r.fqn for r in records if r.lowered} == {"5", "7"}
    targets = [node.target for gm in capture.graphs for node in gm.graph.nodes]
    assert targets.count(aten.convolution.default) == 7 and targets.count(aten.convolution_backward.default) == 7


def test_convolution_gradients_are_exact_where_nothing_is_quantised_after_them(network):
    trunk, x = network[:5], torch.randn(8, 3, 16, 16)
    plain = [g.clone() for g in torch.autograd.grad(trunk(x).square().mean(), list(trunk.parameters()))]
    model, records, _ = compiled(trunk, Policy("quartet"))
    ours = torch.autograd.grad(model(x).square().mean(), list(trunk.parameters()))
    assert not records
    for a, b in zip(plain, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_it_trains(network):
    model, records, _ = compiled(network, Policy("quartet"))
    x, y = torch.randn(32, 3, 16, 16), torch.arange(32) % 8
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    losses = []
    for _ in range(25):
        loss = cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.9 and losses[-1] < 0.5 * losses[0], losses
    assert network[1].norms[0].num_batches_tracked == 25, "batch statistics are updated once a step"
    assert {r.role for r in records if r.fqn == "5" and r.lowered} == {"fprop", "dgrad", "wgrad"}
