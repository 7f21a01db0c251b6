"""What a rule for power-of-two scales costs in accuracy, on data of several distributions: error and length.

    python benchmarks/scale_rules.py
    python benchmarks/scale_rules.py --rows 512 --seeds 2

Blocks of 32, rotated by H32 and quantised to E2M1 to nearest, each row times 2^u with u between 0 and 1, so that no
rule is lucky with one size. First table: ‖Q(x) − x‖²/‖x‖² in thousandths, and the length ⟨Q(x), x⟩/⟨x, x⟩, which is 1
where a rule neither shrinks nor stretches. Second table: the same length of Y = X · Wᵀ and of its two gradients, for a
Gaussian W, forward with the rule and backward as the recipe ``quartet`` has it; the gradients' relative error with it.

``signed`` has the fixed signs of ``quartet`` before H32. Rules are those of the package, and some that it has not:

    amax/c          2^⌈log2(amax/c)⌉: ``ceil`` with another number than 6
    max(…)          the larger of ``quest`` and that
    least of two    of ``ceil`` and one power below, that with the smaller squared error of the block
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence

import torch
from gpu_common import say, table
from torch import Tensor

from quartet.kernels.reference import (
    QuartetLinear,
    e2m1_decode,
    e2m1_encode,
    e8m0_decode,
    e8m0_reciprocal,
    e8m0_scale,
    hadamard,
)
from quartet.kernels.reference.hadamard import FLAT_SIGNS
from quartet.kernels.spec import QuantSpec

BLOCK = 32
QUEST = QuantSpec(rule="quest", sigma="rms", power="nearest", mask=True)
RELEASED = QuantSpec(rule="quest", sigma="centred", mask=True)
CEIL, EVEN = QuantSpec(), QuantSpec(rule="even")
SIGNED = "even, signed"
SPECS = {"quest(centred,floor)": RELEASED, "quest(rms,nearest)": QUEST, "ceil": CEIL, "even": EVEN}

Rule = Callable[[Tensor], Tensor]  # fp32 blocks [..., 32] → scale bytes [...]


def below(c: float) -> Rule:
    """The smallest power of two under which the largest magnitude is at most ``c``."""
    return lambda blocks: ((blocks.abs().amax(-1).double() / c).log2().ceil() + 127).to(torch.uint8)


def at_least(c: float) -> Rule:
    return lambda blocks: torch.maximum(e8m0_scale(blocks, QUEST), below(c)(blocks))


def least_of_two(blocks: Tensor) -> Tensor:
    high = e8m0_scale(blocks, CEIL)
    low = high - 1
    errors = [(rounded(blocks, scale) - blocks).square().sum(-1) for scale in (high, low)]
    return torch.where(errors[1] < errors[0], low, high)


RULES: dict[str, Rule] = {
    **{name: lambda blocks, spec=spec: e8m0_scale(blocks, spec) for name, spec in SPECS.items()},
    **{f"amax/{c}": below(c) for c in (6.5, 7.5, 8.0)},
    **{f"max(quest, amax/{c})": at_least(c) for c in (7.0, 8.0, 9.0, 10.0)},
    "least of two": least_of_two,
}


def rounded(blocks: Tensor, scale: Tensor) -> Tensor:
    """E2M1 to nearest under a scale byte a block."""
    codes = e2m1_encode(blocks * e8m0_reciprocal(scale).unsqueeze(-1))
    return e2m1_decode(codes) * e8m0_decode(scale).unsqueeze(-1)


def distributions(rows: int, cols: int, gen: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    def normal() -> Tensor:
        return torch.randn(rows, cols, generator=gen)

    yield "Gaussian", normal()
    yield "ReLU", normal().relu()
    yield "randn + 1", normal() + 1
    yield "sigmoid", normal().sigmoid()
    yield "SwiGLU", torch.nn.functional.silu(normal()) * normal()
    yield "Student t(3)", normal() / (normal().square() + normal().square() + normal().square()).div(3).sqrt()
    yield "1 in 320 × 20", normal() * torch.where(torch.rand(rows, cols, generator=gen) < 1 / 320, 20.0, 1.0)


def octave(rows: int) -> Tensor:
    """2^u of every row, u evenly between 0 and 1."""
    return torch.exp2(torch.linspace(0, 1, rows + 1)[:rows]).unsqueeze(1)


def length(made: Tensor, exact: Tensor) -> float:
    return float((made * exact).sum() / exact.square().sum())


def error(made: Tensor, exact: Tensor) -> float:
    return float((made - exact).square().sum() / exact.square().sum())


def of_blocks(x: Tensor, rule: Rule, signed: bool = False) -> tuple[float, float]:
    """Relative squared error and length of what ``rule`` makes of ``x [rows, cols]``, rotated."""
    signs = torch.tensor(FLAT_SIGNS) if signed else None
    blocks = hadamard(x, BLOCK, signs).reshape(x.shape[0], -1, BLOCK)
    made = rounded(blocks, rule(blocks))
    return error(made, blocks), length(made, blocks)


def of_products(x: Tensor, spec: QuantSpec, seed: int, signed: bool = False) -> list[float]:
    """Lengths of Y, ∂L/∂W and ∂L/∂X, and the relative errors of the two gradients."""
    gen = torch.Generator().manual_seed(seed)
    w = torch.randn(64, x.shape[1], generator=gen).mul(octave(64)).requires_grad_()
    e = torch.randn(x.shape[0], 64, generator=gen)
    x = x.clone().requires_grad_()
    y = QuartetLinear.apply(x, w, torch.tensor(seed), 0, spec, BLOCK, FLAT_SIGNS if signed else None)
    exact = x @ w.t()
    pairs = list(zip(torch.autograd.grad(y, (w, x), e), torch.autograd.grad(exact, (w, x), e), strict=True))
    return [length(y.detach(), exact.detach()), *(length(*pair) for pair in pairs),
            *(error(*pair) ** 0.5 for pair in pairs)]


def mean(rows: Sequence[Sequence[float]]) -> list[float]:
    return torch.tensor(rows).mean(0).tolist()


def report(rows: int, seeds: int) -> None:
    gens = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
    data = [dict(distributions(rows, 128, gen)) for gen in gens]
    names = list(data[0])
    lines = [["error · 10³ and length", *names]]
    for name, rule in {**RULES, SIGNED: RULES["even"]}.items():
        results = [mean([of_blocks(each[what] * octave(rows), rule, name == SIGNED) for each in data])
                   for what in names]
        lines.append([name, *(f"{1e3 * squared:.1f} {kept:.3f}" for squared, kept in results)])
    say(table(lines))
    lines = [["length of Y, gW, gX; error of gW, gX", *names]]
    for name, spec in {**SPECS, SIGNED: EVEN}.items():
        results = [mean([of_products(each[what], spec, seed, name == SIGNED) for seed, each in enumerate(data)])
                   for what in names]
        lines.append([name, *(" ".join(f"{value:.2f}" for value in result) for result in results)])
    say(table(lines))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048, help="rows of 128 elements (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=4, help="draws of the data (default %(default)s)")
    args = parser.parse_args(argv)
    report(args.rows, args.seeds)


if __name__ == "__main__":
    main()
