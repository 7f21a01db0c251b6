"""Small models that between them hold every kind of product, gate, mask and reuse that the passes look for.

Sizes are the least at which the recipes take the products: 40 tokens or more, 48 features or more.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
import torch.nn.functional as F
from llama import Llama, LlamaConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

VOCABULARY, WIDTH, HIDDEN, HEADS, LENGTH = 128, 64, 96, 2, 32


class Block(nn.Module):
    """A GPT block: LayerNorm, causal attention, GELU, biases."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Gpt(nn.Module):
    """A tied head, fp32 weights under autocast, the loss inside."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.block, self.norm = Block(), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = self.tokens(tokens) + self.positions.weight
            logits = self.head(self.norm(self.block(x)))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class Experts(nn.Module):
    """A router, and for each token two of four gated experts, as grouped products."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, experts, bias=False)
        self.gate, self.up = (nn.Parameter(torch.randn(experts, WIDTH, HIDDEN) / 8) for _ in range(2))
        self.down = nn.Parameter(torch.randn(experts, HIDDEN, WIDTH) / 8)

    def forward(self, x: Tensor) -> Tensor:
        share, chosen = self.router(x).softmax(-1).topk(2)
        order = chosen.flatten().argsort(stable=True)
        ends = F.one_hot(chosen.flatten(), len(self.gate)).sum(0).cumsum(0).to(torch.int32)
        rows = x[order // 2]
        hidden = F.silu(F.grouped_mm(rows, self.gate, offs=ends)) * F.grouped_mm(rows, self.up, offs=ends)
        y = F.grouped_mm(hidden, self.down, offs=ends) * share.flatten()[order, None]
        return x.index_add(0, order // 2, y)


class Convolutions(nn.Module):
    """Patches, a 3×3 in two groups, a 1×1, and one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(4, WIDTH, 4, 4), nn.BatchNorm2d(WIDTH)
        self.grouped = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=2, bias=False)
        self.point, self.along = nn.Conv2d(WIDTH, HIDDEN, 1), nn.Conv1d(HIDDEN, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.patches(x)))
        return self.along(self.point(F.relu(self.grouped(x))).flatten(2))


class Gated(nn.Module):
    """RMSNorm and SwiGLU with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.gate, self.up = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Checkpointed(nn.Module):
    """One block that is computed again as a whole, and one of which the products are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.whole, self.selective = Gated(), Gated()

    def forward(self, x: Tensor) -> Tensor:
        products = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
        x = checkpoint(self.whole, x, use_reentrant=False)
        return checkpoint(self.selective, x, use_reentrant=False, context_fn=products)


class ByHand(torch.autograd.Function):
    """tanh(x · uᵀ) · dᵀ that keeps no hidden state: backward multiplies x · uᵀ again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        ctx.save_for_backward(x, up, down)
        return torch.tanh(x @ up.t()) @ down.t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (g,), (x, up, down) = gradients, ctx.saved_tensors
        hidden = torch.tanh(x @ up.t())
        before = (g @ down) * (1 - hidden * hidden)
        return before @ up, before.t() @ x, g.t() @ hidden


class Custom(nn.Module):
    """A layer, a custom function, and a batch of one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Parameter(torch.randn(HIDDEN, WIDTH) / 8), nn.Parameter(torch.randn(WIDTH, HIDDEN) / 8)
        self.last = nn.Parameter(torch.randn(1, WIDTH, HIDDEN) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(ByHand.apply(self.first(x), self.up, self.down).unsqueeze(0), self.last)


class Adapters(nn.Module):
    """Rows of a table, a frozen layer with an adapter, used twice, slices of a weight, products of activations."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.a, self.b = nn.Linear(WIDTH, 8, bias=False), nn.Linear(8, WIDTH, bias=False)
        self.pair = nn.Parameter(torch.randn(2 * WIDTH, WIDTH) / 8)

    def adapted(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.adapted(torch.tanh(self.adapted(self.table(tokens))))
        left, right = F.linear(x, self.pair[:WIDTH]), F.linear(x, self.pair[WIDTH:])
        return x @ torch.bmm(left.transpose(1, 2), right)


@dataclass(frozen=True)
class Case:
    """How to make a model and its inputs, and how it is compiled and called."""

    make: Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]
    dynamic: bool = False
    open_attention: bool = False
    trains: bool = True


def texts(model: Callable[[], nn.Module]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A language model with its loss, tokens and targets."""
    tokens, targets = torch.randint(VOCABULARY, (2, 2, LENGTH)).unbind()
    return model(), (tokens, targets)


def features(model: Callable[[], nn.Module], *shape: int,
             dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A model with normal inputs that want no gradient."""
    return model().to(dtype), (torch.randn(shape).to(dtype),)


def llama() -> nn.Module:
    return Llama(LlamaConfig(WIDTH, 1, HEADS, HIDDEN, vocabulary=VOCABULARY), LENGTH).bfloat16()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 80), nn.ReLU(), nn.Linear(80, WIDTH))


CASES: dict[str, Case] = {
    "llama": Case(partial(texts, llama)),
    "gpt": Case(partial(texts, Gpt)),
    "mlp": Case(partial(features, mlp, 72, WIDTH, dtype=torch.float32)),
    "experts": Case(partial(features, Experts, 64, WIDTH)),
    "convolutions": Case(partial(features, Convolutions, 2, 4, 32, 32)),
    "attention": Case(partial(features, Block, 2, 40, WIDTH), open_attention=True),
    "checkpointed": Case(partial(features, Checkpointed, 2, 40, WIDTH)),
    "custom": Case(partial(features, Custom, 72, WIDTH)),
    "lengths": Case(partial(features, Gated, 3, 40, WIDTH), dynamic=True),
    "adapters": Case(lambda: (Adapters().bfloat16(), (torch.randint(VOCABULARY, (2, 40)),))),
    "evaluated": Case(partial(texts, llama), trains=False),
}
