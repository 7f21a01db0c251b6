"""From which width on a square linear layer pays, forward and backward, by the cost model: the table of
docs/performance.md, printed anew.

    python benchmarks/break_even.py
    python benchmarks/break_even.py --gpus a100,"rtx 3090" --recipes int8-all
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from gpu_common import names

from quartet.lowering import registry
from quartet.lowering.cost import Layer, break_even
from quartet.lowering.rates import Host, rates_of
from quartet.lowering.recipe.types import ROLES
from quartet.recipes import resolve
from quartet.runtime.devices import Target

TOKENS = (2048, 4096, 8192, 16384)
TITLES = {"h200": "H200", "h100": "H100 SXM", "b200": "B200", "rtx 4090": "RTX 4090", "a100": "A100"}


def columns(gpus: Sequence[str], recipes: Sequence[str], graphs: bool) -> Iterator[tuple[str, list[float]]]:
    """(title, a width for each number of tokens); of the first GPU also with products of forward computed again."""
    for gpu in gpus:
        target = Target.named(gpu)
        rates = rates_of(target)
        if rates is None:
            raise SystemExit(f"no rates of {gpu} are known")
        rates = replace(rates, host=Host()) if graphs else rates
        for name in recipes:
            recipe = resolve(name)
            assert recipe is not None
            kernels = {role: registry.multiplies(getattr(recipe, role), target, torch.bfloat16) for role in ROLES}
            title = f"{TITLES.get(gpu, gpu)} `{name}`" if name == recipes[0] else f"`{name}`"
            for recompute in (False, True) if recipe.recompute == "gemm" and gpu == gpus[0] else (False,):
                widths = [break_even(recipe, Layer(kernels, m, recompute=recompute), rates) for m in TOKENS]
                yield "product recomputed" if recompute else title, widths


def rounded(width: float) -> str:
    return "never" if math.isinf(width) else f"{round(width, -2):.0f}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=names, default=["h200", "h100", "b200", "rtx 4090"])
    parser.add_argument("--recipes", type=names, default=["quartet", "fp8"])
    parser.add_argument("--cuda-graphs", action="store_true", help="where the host costs nothing")
    args = parser.parse_args(argv)
    found = list(columns(args.gpus, args.recipes, args.cuda_graphs))
    print("| tokens |", *(f"{title} |" for title, _ in found))
    print("|---|" + "---|" * len(found))
    for row, tokens in enumerate(TOKENS):
        print(f"| {tokens} |", *(f"{rounded(widths[row])} |" for _, widths in found))


if __name__ == "__main__":
    main()
