"""A gated layer and an input of it."""

import torch
from torch import nn
from torch.nn.functional import silu


class Gated(nn.Module):
    def __init__(self, width=64, hidden=96):
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.down(silu(self.gate(x)) * self.up(x))


def data():
    torch.manual_seed(3)
    return [torch.randn(128, 64).requires_grad_()]
