"""A vision transformer that tells drawn shapes apart, with its matmuls in low precision.

    python examples/vit.py
    python examples/vit.py --policy fp8 --steps 300

The images are made as they are needed: squares, discs and crosses of any size and place, under noise.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn as nn
import torch.nn.functional as F
from descent import adamw, descend, learning_rate
from torch import Tensor

import quartet

SHAPES, SIDE, PATCH = ("square", "disc", "cross"), 32, 4


def draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images [count, 1, 32, 32] and the numbers of their shapes [count]."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(len(SHAPES), (count,), generator=generator)
    centre = torch.randint(10, SIDE - 10, (2, count, 1, 1), generator=generator)
    size = torch.randint(5, 9, (count, 1, 1), generator=generator)
    grid = torch.arange(SIDE)
    dy, dx = (grid[None, :, None] - centre[0]).abs(), (grid[None, None, :] - centre[1]).abs()
    inside = (torch.maximum(dx, dy) <= size, dx * dx + dy * dy <= size * size,
              (torch.minimum(dx, dy) <= 1) & (torch.maximum(dx, dy) <= size))
    image = torch.stack(inside).float()[kind, torch.arange(count)]
    return (image + 0.3 * torch.randn(image.shape, generator=generator))[:, None], kind


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.ffn_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.ffn_norm(x))))


class VisionTransformer(nn.Module):
    """``model(images [batch, 1, 32, 32])`` is [batch, 3], a score a shape."""

    def __init__(self, dim: int = 128, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, dim, PATCH, PATCH)
        self.positions = nn.Parameter(0.02 * torch.randn((SIDE // PATCH) ** 2, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, len(SHAPES))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def main() -> float:
    """Train and test; returns the share of unseen images that are named right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="quartet", help="a recipe or a .toml file")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--layers", type=int, default=2)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = VisionTransformer(layers=arguments.layers).to(device)
    optimizer = adamw(model, 2e-3)
    for block in model.blocks:  # one piece of code serves all of them, and is compiled once
        quartet.compile(block, arguments.policy)
    for step in range(arguments.steps):
        images, kind = draw(arguments.batch, step)
        loss = F.cross_entropy(model(images.to(device)), kind.to(device))
        descend(model, optimizer, loss, learning_rate(step, arguments.steps, 2e-3))
        if step % 20 == 0 or step == arguments.steps - 1:
            print(f"step {step:4d}  loss {loss.item():.3f}")
    images, kind = draw(256, -1)
    with torch.no_grad():
        right = (model(images.to(device)).argmax(1).cpu() == kind).float().mean().item()
    print(f"{right:.0%} of {len(kind)} unseen images are named right")
    return right


if __name__ == "__main__":
    main()
