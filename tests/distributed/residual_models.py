"""An MLP with a residual connection, and two of them in a row: what the workers train."""

import torch
from torch import nn


class MLP(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Deep(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.layers = nn.ModuleList(MLP(width, hidden) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x
