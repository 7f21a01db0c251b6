"""Tiny models, each with its inputs and the matmuls that the default policy lowers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from harness import ALL, FIRST
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


class MLP(nn.Module):
    def __init__(self, d: int = 64, f: int = 96, out: int = 64) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d, f), nn.Linear(f, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """A Llama block: RMSNorm, rotary attention, SwiGLU."""

    def __init__(self, d: int = 64, heads: int = 2, f: int = 96) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(d), nn.RMSNorm(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(d, f, bias=False), nn.Linear(d, f, bias=False)
        self.down = nn.Linear(f, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        y = self.norm1(x)
        q, k, v = (p(y).view(b, t, self.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        angle = torch.arange(t)[:, None] / 100 ** torch.linspace(0, 1, d // self.heads // 2)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)

        def rotary(h: Tensor) -> Tensor:
            a, c = h.chunk(2, -1)
            return torch.cat((a * cos - c * sin, c * cos + a * sin), -1)

        y = F.scaled_dot_product_attention(rotary(q), rotary(k), v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, t, d))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Residual(nn.Module):
    """Two residual blocks, each called as ``wrap(block, x)``."""

    def __init__(self, wrap: Callable[..., Tensor], d: int = 64) -> None:
        super().__init__()
        self.wrap, self.norm = wrap, nn.RMSNorm(d)
        self.blocks = nn.ModuleList(nn.Sequential(nn.RMSNorm(d), MLP(d, 96, d)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + self.wrap(block, x)
        return self.norm(x)


class Llama(nn.Module):
    def __init__(self, layers: int = 1, d: int = 64, vocab: int = 64, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, d)
        self.layers = nn.ModuleList(Block(d) for _ in range(layers))
        self.norm, self.lm_head = nn.RMSNorm(d), nn.Linear(d, vocab, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.lm_head(self.norm(x)).flatten(0, 1).float(), target.flatten())


class Product(nn.Module):
    """``function(x, weight, bias)`` with a weight of the given shape, and a bias where wanted."""

    def __init__(self, function: Callable[..., Tensor], *shape: int, bias: int = 0) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(*shape) / 8)
        self.bias = nn.Parameter(torch.randn(bias)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.bias)


class LoRA(nn.Module):
    """A frozen base with a trained adapter, twice."""

    def __init__(self, d: int = 64, rank: int = 8) -> None:
        super().__init__()
        self.base1, self.base2 = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
        self.base1.weight.requires_grad_(False)
        self.base2.weight.requires_grad_(False)
        self.a, self.b = nn.Linear(d, rank, bias=False), nn.Linear(rank, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.base1(x) + self.b(self.a(x)))
        return self.base2(x)


class Twice(nn.Module):
    def __init__(self, d: int = 64) -> None:
        super().__init__()
        self.fc = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.fc(x)))


class Attention(nn.Module):
    """nn.MultiheadAttention: one in_proj weight, sliced when query and key differ."""

    def __init__(self, d: int = 64, cross: bool = False) -> None:
        super().__init__()
        self.mha, self.cross = nn.MultiheadAttention(d, 2, batch_first=True), cross

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, x.flip(1) if self.cross else x, x, need_weights=False)[0]


def _chunked(x: Tensor, w: Tensor, b: Any) -> Tensor:
    q, k, v = (F.linear(x, part) for part in w.chunk(3))
    return torch.tanh(q) * k + v


@dataclass
class Case:
    """A model with its inputs, and the roles that are lowered by module name."""

    model: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    lowered: dict[str, frozenset[str]]
    alone: dict[str, frozenset[str]] = field(default_factory=dict)


def tokens(b: int = 2, t: int = 20, vocab: int = 64) -> tuple[Tensor, Tensor]:
    i = torch.randint(0, vocab, (b, t + 1), generator=torch.Generator().manual_seed(3))
    return i[:, :-1].contiguous(), i[:, 1:].contiguous()


def data(*shape: int, grad: bool = False) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.randn(*shape, generator=torch.Generator().manual_seed(7)).requires_grad_(grad),)


X = data(2, 20, 64, grad=True)
BLOCK = {f"layers.0.{name}": ALL for name in ("q", "k", "v", "o", "gate", "up", "down")}
W = {"weight": ALL}
ENDS = {"embed": frozenset({"fprop"}), "layers.0": ALL, "lm_head": ALL}  # layers.0: its fused attention


def _product(function: Callable[..., Tensor], *shape: int, inputs=X, bias: int = 0) -> Case:
    return Case(lambda: Product(function, *shape, bias=bias), inputs, W)


CASES: dict[str, Case] = {
    "mlp": Case(MLP, data(40, 64), {"up": FIRST, "down": ALL}),
    "mlp_input_grad": Case(MLP, X, {"up": ALL, "down": ALL}),
    "llama": Case(Llama, tokens, BLOCK, ENDS),
    "llama_tied": Case(lambda: Llama(tied=True), tokens, BLOCK, ENDS),
    "lora": Case(LoRA, X, {"base1": frozenset({"fprop", "dgrad"}), "base2": frozenset({"fprop", "dgrad"}),
                           "a": FIRST, "b": frozenset({"dgrad", "wgrad"})},
                 {"a": frozenset({"dgrad"}), "b": frozenset({"fprop"})}),  # contract the rank
    "twice": Case(Twice, X, {"fc": ALL}),
    "self_attention": Case(Attention, X, {"mha.in_proj_weight": ALL, "mha.out_proj": ALL}, {"mha": ALL}),
    "cross_attention": Case(lambda: Attention(cross=True), X, {"mha.in_proj_weight": ALL, "mha.out_proj": ALL},
                            {"mha": ALL}),
    "weight_norm": Case(lambda: weight_norm(nn.Linear(64, 48)), X, W),
    "conv1d": _product(lambda x, w, b: torch.addmm(b, x.view(-1, 64), w).view(2, 20, 48), 64, 48, bias=48),
    "linear_bias": _product(lambda x, w, b: F.linear(x, w, b), 48, 64, bias=48),
    "matmul": _product(lambda x, w, b: x @ w, 64, 48),
    "matmul_2d": _product(lambda x, w, b: x @ w, 64, 48, inputs=data(40, 64, grad=True)),
    "weight_first": _product(lambda x, w, b: w @ x, 48, 64, inputs=data(64, 40, grad=True)),
    "einsum_nd": _product(lambda x, w, b: torch.einsum("btd,nd->btn", x, w), 48, 64),
    "einsum_dn": _product(lambda x, w, b: torch.einsum("btd,dn->btn", x, w), 64, 48),
    "einsum_heads": _product(lambda x, w, b: torch.einsum("bthd,hdn->btn", x, w), 4, 16, 48,
                             inputs=data(2, 20, 4, 16, grad=True)),
    "chunked": _product(_chunked, 144, 64),
    "column_major_weight": Case(lambda: Product(lambda x, w, b: x @ w.t().contiguous().t(), 64, 48), X, W),
    "column_major_input": _product(lambda x, w, b: F.linear(x.t(), w), 48, 64, inputs=data(64, 40, grad=True)),
    "bf16": Case(lambda: Llama().bfloat16(), tokens, BLOCK, ENDS),
}
