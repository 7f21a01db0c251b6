"""Random small models as data: a program is a list of steps, each of which maps ``[batch, time, width]`` to its shape.

Whatever subset of a program's steps is a program too, so that a failing one can be made shorter. Steps keep gradients
away from zero: the comparison with full precision would otherwise be one of noise.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTHS = (32, 40, 48, 64, 96)
HIDDEN = (8, 33, 48, 64, 80, 128)
HEADS = {32: 2, 40: 2, 48: 3, 64: 4, 96: 4}


@dataclass(frozen=True)
class Step:
    """One step: its kind, and what it chose at random."""

    kind: str
    options: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Program:
    """A model and its inputs; prints as Python that makes it again."""

    width: int
    batch: int
    times: tuple[int, ...]  # of the calls, one after the other: several are compiled with symbolic sizes
    dtype: str
    steps: tuple[Step, ...]
    seed: int = 0

    def build(self) -> Model:
        torch.manual_seed(self.seed)
        return Model(self).to(getattr(torch, self.dtype))

    def inputs(self) -> list[tuple[Tensor, Tensor]]:
        """(values, indices) of each call."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        made = []
        for time in self.times:
            x = torch.randn(self.batch, time, self.width, generator=generator).to(getattr(torch, self.dtype))
            made.append((x, torch.randint(0, 16, (self.batch, time), generator=generator)))
        return made


class Model(nn.Module):
    """The steps of a program, each with a norm before it and, where it says so, a residual around it."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.first = nn.Linear(program.width, program.width)  # so that what follows reads activations
        self.steps = nn.ModuleList(KINDS[step.kind](program.width, *step.options) for step in program.steps)
        self.norms = nn.ModuleList(nn.LayerNorm(program.width) for _ in program.steps)

    def forward(self, x: Tensor, indices: Tensor) -> Tensor:
        h = self.first(x)
        for norm, step in zip(self.norms, self.steps, strict=True):
            h = h + step(norm(h), indices)
        return h


def program(seed: int) -> Program:
    """The program of a seed."""
    choose = random.Random(seed)
    width = choose.choice(WIDTHS)
    steps = []
    for _ in range(choose.randint(1, 5)):
        kind = choose.choice(list(KINDS))
        steps.append(Step(kind, tuple(choose.choice(options) for options in OPTIONS.get(kind, ()))))
    times = choose.choice(((20,), (32,), (7,), (1,), (16, 24, 33)))
    return Program(width, choose.choice((1, 2, 3)), times, choose.choice(("float32", "bfloat16")), tuple(steps), seed)


KINDS: dict[str, Callable[..., nn.Module]] = {}
OPTIONS: dict[str, tuple[tuple[Any, ...], ...]] = {}


def kind(*options: tuple[Any, ...]) -> Callable[[Any], Any]:
    """Register a kind of step, named as its class in lower case; ``options``: what each argument is chosen from."""

    def register(made: Any) -> Any:
        KINDS[made.__name__.lower()] = made
        OPTIONS[made.__name__.lower()] = options
        return made

    return register


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / shape[-1] ** 0.5)


@kind((True, False), ("gelu", "tanh", "silu", "none"))
class Linear(nn.Module):
    def __init__(self, d: int, bias: bool, act: str) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(d, d, bias=bias), act

    def forward(self, x: Tensor, indices: Tensor) -> Tensor:
        y = self.fc(x)
        return y if self.act == "none" else getattr(torch if self.act == "tanh" else F, self.act)(y)


@kind(HIDDEN, (True, False), (None, "checkpoint", "autocast"))
class Mlp(nn.Module):
    def __init__(self, d: int, hidden: int, gated: bool, within: str | None) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d, hidden), nn.Linear(hidden, d)
        self.gate = nn.Linear(d, hidden) if gated else None
        self.within = within

    def _run(self, x: Tensor) -> Tensor:
        up = self.up(x)
        return self.down(F.gelu(up) if self.gate is None else F.silu(self.gate(x)) * up)

    def forward(self, x: Tensor, indices: Tensor) -> Tensor:
        if self.within == "checkpoint":
            return checkpoint(self._run, x, use_reentrant=False)
        with torch.autocast("cpu", torch.bfloat16) if self.within == "autocast" else nullcontext():
            return self._run(x).to(x.dtype)


@kind(("matmul", "transposed", "first", "einsum", "heads", "addmm", "baddbmm"))
class Product(nn.Module):
    """A parameter multiplied without a layer around it."""

    def __init__(self, d: int, way: str) -> None:
        super().__init__()
        self.way, self.heads = way, HEADS[d]
        self.w = matrix(d, d)
        self.b = nn.Parameter(torch.randn(d) / 4)

    def forward(self, x: Tensor, indices: Tensor) -> Tensor:
        b, t, d = x.shape
        match self.way:
            case "matmul":
                return x @ self.w
            case "transposed":
                return x @ self.w.t() + self.b
            case "first":
                return (self.w @ x.transpose(1, 2)).transpose(1, 2)
            case "einsum":
                return torch.einsum("btd,nd->btn", x, self.w)
            case "heads":
                w = self.w.view(self.heads, d // self.heads, d)
                return torch.einsum("bthd,hdn->btn", x.view(b, t, self.heads, -1), w)
            case "addmm":
                return torch.addmm(self.b, x.reshape(-1, d), self.w).view(b, t, d)
            case _:
                return torch.baddbmm(self.b.expand(b, t, d), x, self.w.expand(b, d, d))


@kind(("slice", "chunk", "cat", "scaled", "sum", "frozen", "product", "normed", "column major"))
class Computed(nn.Module):
    """A weight that is not a parameter as it stands."""

    def __init__(self, d: int, way: str) -> None:
        super().__init__()
        self.way = way
        self.w = matrix(2 * d, d)
        self.v = matrix(d, d)
        self.v.requires_grad_(way != "frozen")

    def forward(self, x: Tensor, indices: Tensor) -> Tensor:
        d = x.shape[-1]
        match self.way:
            case "slice":
                return F.linear(x, self.w[:d]) + F.linear(x, self.w[d // 2 : d // 2 + d])
            case "chunk":
                a, b = F.linear(x, self.w).chunk(2, -1)
                return a * torch.sigmoid(b)
            case "cat":
                a, b = F.linear(x, torch.cat((self.v, self.w[:d]))).split(d, -1)
                return a + torch.tanh(b)
            case "scaled":
                return F.linear(x, self.v * 0.5)
            case "sum":
                return F.linear(x, self.v + self.w[:d])
            case "frozen":
                return F.linear(x, self.v)
            case "product":
                return F.linear(x, self.v @ self.w[:d])
            case "normed":
                return F.linear(x, F.normalize(self.v, dim=1))
            case _:
                return F.linear(x, self.v.t().contiguous().t())


@kind()
class Shared(nn.Module):
    """One layer, used twice."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.fc = nn.Linear(d, d)

    def forward(self, x: Tensor, indices: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.fc(x)))


@kind((True, False), ("fused", "written", "multihead"))
class Attention(nn.Module):
    def __init__(self, d: int, causal: bool, way: str) -> None:
        super().__init__()
        self.heads, self.causal, self.way = HEADS[d], causal, way
        if way == "multihead":
            self.mha = nn.MultiheadAttention(d, self.heads, batch_first=True)
        else:
            self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d)

    def forward(self, x: Tensor, indices: Tensor) -> Tensor:
        if self.way == "multihead":
            return self.mha(x, x, x, need_weights=False)[0]
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.way == "fused":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            scores = q @ k.transpose(-1, -2) * (d // self.heads) ** -0.5
            if self.causal:
                scores = scores.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), float("-inf"))
            y = scores.softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(b, t, d))


@kind()
class Bilinear(nn.Module):
    """Products of activations."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(d, d), nn.Linear(d, d)

    def forward(self, x: Tensor, indices: Tensor) -> Tensor:
        state = self.a(x).transpose(1, 2) @ self.b(x) / x.shape[1]
        return x @ state


@kind((1, 3), (1, 2, "depthwise"))
class Conv(nn.Module):
    def __init__(self, d: int, size: int, groups: Any) -> None:
        super().__init__()
        self.conv = nn.Conv1d(d, d, size, padding=size // 2, groups=d if groups == "depthwise" else groups)

    def forward(self, x: Tensor, indices: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


@kind((True, False))
class Embedding(nn.Module):
    """Rows of a table, which the same step may multiply with as well."""

    def __init__(self, d: int, tied: bool) -> None:
        super().__init__()
        self.table, self.tied = nn.Embedding(16, d), tied

    def forward(self, x: Tensor, indices: Tensor) -> Tensor:
        rows = self.table(indices)
        return rows + F.linear(x, self.table.weight) @ self.table.weight / 16 if self.tied else rows


@kind(("transpose", "roll", "cat", "pad", "expand", "strided"))
class Views(nn.Module):
    """What stands between a layer and its input."""

    def __init__(self, d: int, way: str) -> None:
        super().__init__()
        self.way, self.fc = way, nn.Linear(d, d)

    def forward(self, x: Tensor, indices: Tensor) -> Tensor:
        b, t, d = x.shape
        match self.way:
            case "transpose":
                return self.fc(x.transpose(0, 1)).transpose(0, 1)
            case "roll":
                return self.fc(x.roll(1, 1).flip(-1))
            case "cat":
                return self.fc(torch.cat((x[..., d // 2 :], x[..., : d // 2]), -1))
            case "pad":
                return self.fc(F.pad(x, (0, 0, 0, 3)))[:, :t]
            case "expand":
                return self.fc(x.unsqueeze(0).expand(2, b, t, d)).mean(0)
            case _:
                return self.fc(x.repeat_interleave(2, 1)[:, ::2])


@kind()
class InPlace(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.fc = nn.Linear(d, d)

    def forward(self, x: Tensor, indices: Tensor) -> Tensor:
        y = self.fc(x)
        y[:, ::2] *= 0.5
        y.add_(x)
        return y.mul_(0.5)


class _LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g @ w, g.flatten(0, 1).t() @ x.flatten(0, 1)


class _AdapterFunction(torch.autograd.Function):
    """``x·Wᵀ + x·Aᵀ·Bᵀ`` with a frozen W; A's output is made again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(x, w, a, b)
        return x @ w.t() + (x @ a.t()) @ b.t()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        x, w, a, b = ctx.saved_tensors
        down = g @ b
        flat, rows = g.flatten(0, 1), x.flatten(0, 1)
        return g @ w + down @ a, None, down.flatten(0, 1).t() @ rows, flat.t() @ (rows @ a.t())


@kind(("linear", "adapter"))
class Function(nn.Module):
    """Products in an autograd.Function that is written by hand."""

    def __init__(self, d: int, way: str) -> None:
        super().__init__()
        self.way = way
        self.weight = matrix(d, d)
        if way == "adapter":
            self.weight.requires_grad_(False)
            self.a, self.b = matrix(32, d), matrix(d, 32)

    def forward(self, x: Tensor, indices: Tensor) -> Tensor:
        if self.way == "adapter":
            return _AdapterFunction.apply(x, self.weight, self.a, self.b)
        return _LinearFunction.apply(x, self.weight)


@kind()
class Chunks(nn.Module):
    """A length padded to a multiple, cut into chunks, and put together again."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.fc = nn.Linear(d, d)

    def forward(self, x: Tensor, indices: Tensor) -> Tensor:
        b, t, d = x.shape
        pad = -t % 8
        h = F.pad(x, (0, 0, 0, pad)).reshape(b, -1, 8, d)
        h = (h + h.mean(2, keepdim=True)).reshape(b, -1, d)
        return self.fc(h[:, :t])


@kind(("soft", "hard"))
class Experts(nn.Module):
    def __init__(self, d: int, way: str) -> None:
        super().__init__()
        self.way, self.pick = way, nn.Linear(d, 3, bias=False)
        self.experts = nn.ModuleList(nn.Linear(d, d) for _ in range(3))

    def forward(self, x: Tensor, indices: Tensor) -> Tensor:
        weights = self.pick(x).softmax(-1)
        if self.way == "hard":
            weights = weights * F.one_hot(weights.argmax(-1), 3)
        return sum(expert(x) * weights[..., i : i + 1] for i, expert in enumerate(self.experts))
