"""Forward and backward of the experts of one mixture-of-experts layer, in BF16 against FP8 and FP4.

    python benchmarks/bench_grouped.py
    python benchmarks/bench_grouped.py --shapes single --columns bf16,torchao,fp8 --time-limit 420
    python benchmarks/bench_grouped.py --arbitrary
    python benchmarks/bench_grouped.py --shapes goals --columns bf16,fp8,quartet --micro-batches 4 --repeat 8
    python benchmarks/bench_grouped.py --profile fp8 --shapes 16384x4096x14336x8

A case is ``tokens x in x out x experts`` of one grouped product (``torch.nn.functional.grouped_mm``),
``swiglu-tokens x dim x hidden x experts`` of gate, up, silu(gate)·up and down, or ``fused-…`` of the same with gate and
up as one product. Weights are ``[experts, out, in]`` and passed transposed, as Hugging Face and torchtitan do; tokens
are in the order of their experts already. The experts' shares of the tokens are a fixed random draw, or equal with
``--no-uneven``. FP8 kernels of the peer take groups of multiples of 16 tokens only, so all columns get such sizes, the
same ones; with ``--arbitrary`` sizes are multiples of nothing, and the peer is not measured.

``bf16`` is Inductor, ``torchao`` its prototype of FP8 training with scales of rows (the op itself, compiled by
Inductor), and other columns are our recipes on these products. How columns are compiled, timed and compared, what the
table says and how a run continues are those of ``bench_linear.py``, what a step of several micro-batches is
``micro_batches.py``.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import bench_linear
import gpu_common as common
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

PEER = "torchao"
COLUMNS = (common.BASELINE, PEER, *common.OURS)
PRODUCT, SWIGLU, FUSED = "", "swiglu-", "fused-"
PRODUCTS = {PRODUCT: 1, SWIGLU: 3, FUSED: 3}
MODELS = ("16384x4096x14336x8", "16384x5120x2048x16", "32768x2048x1536x64", "65536x2048x768x128")
GOALS = tuple(SWIGLU + name for name in ("32768x4096x14336x8", MODELS[1], MODELS[2]))
GROUPS = {"goals": GOALS, "single": MODELS, "swiglu": tuple(SWIGLU + name for name in MODELS),
          "fused": tuple(FUSED + name for name in MODELS)}
UNIT = 16  # tokens; groups of the peer are multiples of it
SPREAD = 0.5  # standard deviation of the logarithm of an expert's share
GroupedMM = Callable[[Tensor, Tensor, Tensor], Tensor]


def grouped_mm(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(x, w, offs=ends)


def peer_grouped_mm() -> GroupedMM:
    """torchao's quantised :func:`grouped_mm`. Called itself: its weights, where wrapped, react to ``torch._grouped_mm``
    only and leave ``torch.nn.functional.grouped_mm`` in BF16."""
    from torchao.prototype.moe_training.fp8_grouped_mm import _to_fp8_rowwise_then_scaled_grouped_mm

    return lambda x, w, ends: _to_fp8_rowwise_then_scaled_grouped_mm(x, w, ends, pad_token_groups_for_grouped_mm=False)


def group_ends(tokens: int, experts: int, unit: int, uneven: bool, seed: int) -> list[int]:
    """Where each group of tokens ends, multiples of ``unit``; the last one at ``tokens``."""
    draw = random.Random(seed)
    shares = [math.exp(SPREAD * draw.gauss(0, 1)) if uneven else 1.0 for _ in range(experts)]
    total = sum(shares)
    return [unit * round(tokens // unit * until / total) for until in itertools.accumulate(shares)]


class Experts(nn.Module):
    """Tokens ``[tokens, in]`` through the experts whose groups end at ``ends``; ``product`` multiplies."""

    def __init__(self, ends: Sequence[int]) -> None:
        super().__init__()
        self.ends: Tensor
        self.register_buffer("ends", torch.tensor(ends, dtype=torch.int32))
        self.product: GroupedMM = grouped_mm

    def weight(self, fan_in: int, fan_out: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(len(self.ends), fan_out, fan_in) / fan_in**0.5)

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.product(x, weight.transpose(1, 2), self.ends)


class OneProduct(Experts):
    def __init__(self, fan_in: int, fan_out: int, ends: Sequence[int]) -> None:
        super().__init__(ends)
        self.proj = self.weight(fan_in, fan_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.proj)


class SwiGLU(Experts):
    def __init__(self, dim: int, hidden: int, ends: Sequence[int]) -> None:
        super().__init__(ends)
        self.gate, self.up, self.down = self.weight(dim, hidden), self.weight(dim, hidden), self.weight(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(F.silu(self.multiply(x, self.gate)) * self.multiply(x, self.up), self.down)


class FusedSwiGLU(Experts):
    def __init__(self, dim: int, hidden: int, ends: Sequence[int]) -> None:
        super().__init__(ends)
        self.gate_up, self.down = self.weight(dim, 2 * hidden), self.weight(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.multiply(x, self.gate_up).chunk(2, dim=1)
        return self.multiply(F.silu(gate) * up, self.down)


FORMS: dict[str, Callable[[int, int, Sequence[int]], Experts]] = {
    PRODUCT: OneProduct, SWIGLU: SwiGLU, FUSED: FusedSwiGLU}


@dataclass(frozen=True)
class Shape:
    """One case, a ``bench_linear.Layer``: ``ends`` is where each expert's tokens end."""

    form: str
    tokens: int
    fan_in: int
    fan_out: int
    ends: tuple[int, ...]

    @classmethod
    def parse(cls, name: str, *, uneven: bool, arbitrary: bool, seed: int) -> Shape:
        match = re.fullmatch(r"(swiglu-|fused-)?(\d+)x(\d+)x(\d+)x(\d+)", name)
        if match is None:
            raise ValueError(f"shape {name!r} is neither a group ({', '.join(GROUPS)}) nor TOKENSxINxOUTxEXPERTS nor "
                             "swiglu- or fused-TOKENSxDIMxHIDDENxEXPERTS, for example 16384x4096x14336x8")
        tokens, fan_in, fan_out, experts = map(int, match.groups()[1:])
        unit = 1 if arbitrary else UNIT
        if tokens < 1 or tokens % unit or experts < 1:
            raise ValueError(f"shape {name!r} has {tokens} tokens for {experts} experts; groups of multiples of {unit} "
                             f"need at least one expert and a multiple of {unit} tokens, for example "
                             f"{max(-(-tokens // unit), 1) * unit}")
        return cls(match[1] or PRODUCT, tokens, fan_in, fan_out,
                   tuple(group_ends(tokens, experts, unit, uneven, seed)))

    @property
    def flops(self) -> int:
        return PRODUCTS[self.form] * 6 * self.tokens * self.fan_in * self.fan_out

    @property
    def outputs(self) -> int:
        return self.fan_out if self.form == PRODUCT else self.fan_in

    def describe(self) -> dict[str, Any]:
        sizes = [end - start for start, end in zip((0, *self.ends), self.ends, strict=False)]
        return {"tokens": self.tokens, "in": self.fan_in, "out": self.fan_out, "experts": len(self.ends),
                "group_sizes": sizes}

    def model(self) -> Experts:
        return FORMS[self.form](self.fan_in, self.fan_out, self.ends)

    def prepare(self, column: str, model: nn.Module) -> nn.Module:
        if column == PEER:
            assert isinstance(model, Experts)
            model.product = peer_grouped_mm()
        return model

    def policy(self, column: str) -> Any:
        """The column's recipe on grouped products alone, there are no others; none for peers."""
        from quartet.policy import Policy

        recipe = column.partition(":")[0]
        return None if recipe in (common.BASELINE, PEER) else Policy(None).on(op="grouped", recipe=recipe)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bench_linear.add_arguments(parser, COLUMNS, GROUPS, "single,swiglu,fused")
    parser.add_argument("--uneven", action=argparse.BooleanOptionalAction, default=True,
                        help="tokens divided among the experts by a random draw (the default), or evenly")
    parser.add_argument("--arbitrary", action="store_true",
                        help=f"groups of any number of tokens, not only multiples of {UNIT}; without {PEER}")
    common.add_arguments(parser, "bench_grouped", "case")
    args = parser.parse_args(argv)
    if args.arbitrary and args.columns == list(COLUMNS):
        args.columns.remove(PEER)
    if args.arbitrary and PEER in (*args.columns, args.profile):
        parser.error(f"the kernels of {PEER} take groups of multiples of {UNIT} tokens only; measure it without "
                     "--arbitrary")
    args.shapes = bench_linear.parse_shapes(parser, args.shapes, GROUPS, partial(
        Shape.parse, uneven=args.uneven, arbitrary=args.arbitrary, seed=args.seed))
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    record = bench_linear.measure_all(args, "bench_grouped", uneven=args.uneven, arbitrary=args.arbitrary)
    if record is not None:
        bench_linear.report(record, args.columns, "tokens x in x out x experts", tuple(args.shapes),
                            f"{len(args.shapes)} cases")


if __name__ == "__main__":
    main()
