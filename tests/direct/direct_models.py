"""A small classifier and its task, for the tests of direct quantised training."""

import torch
from torch import nn

from quartet import direct

BITS = ("ternary", 2, 3, 4, 8)


class Net(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.up, self.down = nn.Linear(32, width), nn.Linear(width, 64, bias=False)
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 8)

    def forward(self, x):
        return self.head(self.norm(self.down(nn.functional.gelu(self.up(x)))))


def net(bits=None, seed=0, **options):
    torch.manual_seed(seed)
    model = Net()
    return model if bits is None else direct.convert(model, bits, **options)


def task(n=128):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(n, 32, generator=generator)
    return x, (x @ torch.randn(32, 8, generator=generator)).argmax(1)


def wrapped(model, inner=torch.optim.AdamW, lr=3e-3, seed=0, **options):
    return direct.Optimizer(inner(model.parameters(), lr=lr), generator=torch.Generator().manual_seed(seed), **options)


def train(model, optimizer, steps, run=None):
    x, y = task()
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy((model if run is None else run)(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def stored(model):
    """Every number of a model's state, as plain tensors."""
    return {k: v.clone() for k, v in direct.export(model).items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name
