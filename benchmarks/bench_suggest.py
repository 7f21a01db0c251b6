"""Whether a mixed policy that ``quartet.suggest`` proposes trains better than uniform ones of the same predicted time.

    python benchmarks/bench_suggest.py --steps 300 --seeds 3 --out suggest.json

The demo's Llama, small, is trained on its text from the same weights and batches unquantised, under each uniform
policy, and under the policies of least error within the predicted time of each. Errors are measured on the model after
``--warm`` unquantised steps; times are those that the cost model predicts for a GPU and a model ``--scale`` times as
wide. The loss is that of validation, quantised as in training; what counts is its difference from that of the
unquantised run of the same seed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from corpus import Corpus, read_corpus  # noqa: E402
from llama import Llama, LlamaConfig  # noqa: E402

import quartet  # noqa: E402
from quartet.backend import compile_graph  # noqa: E402
from quartet.inspect.suggest import PLAIN, Suggestion  # noqa: E402
from quartet.options import Options  # noqa: E402
from quartet.runtime.capture import Capture  # noqa: E402

VALIDATION = 8  # batches


def backend(policy: quartet.Policy):
    """The graphs of a policy, run as they are: no code is generated."""
    options = Options.parse(None, {"policy": policy})
    return lambda gm, inputs: compile_graph(gm, inputs, options, inner_compile=Capture(), say=lambda *_: None)


def train(policy: quartet.Policy, seed: int, args: argparse.Namespace, corpus: Corpus,
          steps: int | None = None) -> tuple[float, Llama]:
    """Validation loss in nats a byte after the steps, and the model."""
    torch.compiler.reset()
    torch.manual_seed(seed)
    model = Llama(LlamaConfig(dim=args.dim, layers=args.layers, heads=args.dim // 32, ffn=3 * args.dim), args.seq)
    compiled = torch.compile(model, backend=backend(policy))
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    steps = args.steps if steps is None else steps
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 20) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
        optimizer.zero_grad()
        compiled(*corpus.batch("train", seed, step, args.batch, args.seq)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    losses = [compiled(*corpus.batch("validation", 0, i, args.batch, args.seq)).item() for i in range(VALIDATION)]
    return statistics.fmean(losses), model


def suggestions(args: argparse.Namespace, corpus: Corpus) -> dict[str, Suggestion]:
    """Name → policy: each uniform one, and beside it the mixed one of no more predicted time and the least error."""
    _, model = train(quartet.Policy(PLAIN), 0, args, corpus, args.warm)
    batches = [corpus.batch("train", 0, args.steps + i, args.batch, args.seq) for i in range(2)]
    first = quartet.suggest(model, batches, 1e9, recipes=args.recipes, target=args.target, scale=args.scale)
    found: dict[str, Suggestion] = {}
    for recipe in args.recipes:
        found[recipe] = uniform = first.uniform(recipe)
        found[f"mixed as fast as {recipe}"] = first.within(
            f"{100 * uniform.seconds / uniform.plain_seconds + 1e-6}%")
    return found


def _spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.fmean(values):+.4f} ± {statistics.stdev(values) if len(values) > 1 else math.nan:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("steps", 300), ("warm", 100), ("seeds", 3), ("first-seed", 0), ("dim", 128),
                          ("layers", 4), ("seq", 128), ("batch", 8), ("scale", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--target", default="b200")
    parser.add_argument("--recipes", nargs="+", default=["quartet", "nvfp4", "mxfp8"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    corpus = read_corpus()
    found = suggestions(args, corpus)
    for name, one in found.items():
        print(f"{name}: {one.seconds / one.plain_seconds:.3f} of the time in BF16, error {one.error:.2%}\n{one}\n",
              flush=True)
    gaps: dict[str, list[float]] = {name: [] for name in found}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        exact, _ = train(quartet.Policy(PLAIN), seed, args, corpus)
        losses: dict[str, float] = {}
        for name, one in found.items():
            start, key = time.perf_counter(), repr(one.policy)
            losses[key] = loss = losses.get(key) or train(one.policy, seed, args, corpus)[0]
            gaps[name].append(loss - exact)
            print(f"seed {seed}, {name}: {loss:.4f}, BF16 {exact:.4f}, {time.perf_counter() - start:.0f} s", flush=True)
    rows = {name: {"time": one.seconds / one.plain_seconds, "error": one.error, "gaps": gaps[name],
                   "recipes": {layer: option.recipe for layer, option in one.chosen.items()}}
            for name, one in found.items()}
    print("| policy | predicted time | error | loss above BF16, mean ± deviation | each seed |\n|---|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['time']:.3f} | {row['error']:.1%} | {_spread(row['gaps'])} | "
              f"{', '.join(f'{gap:+.4f}' for gap in row['gaps'])} |")
    for recipe in args.recipes:
        mixed = gaps[f"mixed as fast as {recipe}"]
        print(f"mixed as fast as {recipe}, against it, seed by seed: "
              f"{_spread([a - b for a, b in zip(mixed, gaps[recipe], strict=True)])}")
    if args.out is not None:
        args.out.write_text(json.dumps({"arguments": vars(args) | {"out": str(args.out)}, "policies": rows}, indent=1))


if __name__ == "__main__":
    main()
