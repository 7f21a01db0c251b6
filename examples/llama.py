"""A Llama-style language model over bytes: RMSNorm, rotary positions, causal attention, SwiGLU.

No biases, an untied output head, by default a vocabulary of 256 byte values. Nothing here knows about low precision:
the same file trains under any ``torch.compile`` backend.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

VOCABULARY = 256


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes: ``dim`` features in the residual stream, ``ffn`` in the feed-forward, ``dim / heads`` a head, and
    ``vocabulary`` tokens."""

    dim: int
    layers: int
    heads: int
    ffn: int
    rope_base: float = 10000.0
    vocabulary: int = VOCABULARY

    def __post_init__(self) -> None:
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            unit = 2 * self.heads
            raise ValueError(
                f"dim {self.dim} over {self.heads} heads gives no even head size; "
                f"use a dim that is a multiple of {unit}, for example {self.dim + -self.dim % unit}"
            )


PRESETS = {
    "tiny": LlamaConfig(dim=64, layers=2, heads=2, ffn=192),
    "small": LlamaConfig(dim=256, layers=4, heads=4, ffn=768),
    "demo": LlamaConfig(dim=512, layers=8, heads=8, ffn=1536),
    "large": LlamaConfig(dim=4096, layers=4, heads=32, ffn=12288),
}


def rotary_table(length: int, size: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine [length, size / 2] of the angles ``position / base^(2i / size)`` (arXiv 2104.09864)."""
    frequencies = base ** (-torch.arange(0, size, 2) / size)
    angles = torch.outer(torch.arange(length), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + size/2]) of x [..., length, size] by their position's angle."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.k_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.v_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.o_proj = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape

        def split(t: Tensor) -> Tensor:
            return t.view(batch, length, self.heads, -1).transpose(1, 2)

        q = rotate(split(self.q_proj(x)), cos, sin)
        k = rotate(split(self.k_proj(x)), cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, split(self.v_proj(x)), is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))  # as many heads as this rank has


class FeedForward(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.ffn, bias=False)
        self.up_proj = nn.Linear(config.dim, config.ffn, bias=False)
        self.down_proj = nn.Linear(config.ffn, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.ffn = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.ffn(self.ffn_norm(x))


class Llama(nn.Module):
    """``model(tokens, targets)`` is the mean cross-entropy in nats a token, a scalar.

    Args:
        config: the sizes.
        length: tokens in a sequence; ``tokens`` and ``targets`` are int64 [batch, length].
    """

    def __init__(self, config: LlamaConfig, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.lm_head = nn.Linear(config.dim, config.vocabulary, bias=False)
        cos, sin = rotary_table(length, config.dim // config.heads, config.rope_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.initialise(config.layers)

    @torch.no_grad()
    def initialise(self, layers: int) -> None:
        """Normal(0, .02); the projections that write to the residual stream are smaller by √(2·layers)."""
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                weight.normal_(std=0.02 / (2 * layers) ** 0.5 if residual else 0.02)

    def logits(self, tokens: Tensor) -> Tensor:
        """Scores of the next token, [batch, length, vocabulary]."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.lm_head(self.norm(x))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(tokens).flatten(0, 1).float(), targets.flatten())
