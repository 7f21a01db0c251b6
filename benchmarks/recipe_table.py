"""Every recipe at one seed: validation loss of a trained Llama, and how true its first gradient is.

    python benchmarks/recipe_table.py                                                    # on a GPU: 25M, 1000 steps
    python benchmarks/recipe_table.py --interpret --size tiny --steps 300 --batch 8 --seq 64 --device cpu

Model, text, optimizer and loss are those of ``train_gap.py``. The gradient is that of the first batch at the initial
weights, all parameters of quantised layers together: its cosine with the gradient in fp32, and that of the mean of
``--draws`` of them, which random rounding brings closer to 1 where it is unbiased. ``--interpret`` runs the graphs op
by op instead of generating code. Rows are sorted by loss; "published" is what the papers say of the order. A run
continues the file at ``--out``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import byte_training as training
import gpu_common as common
import torch
import train_gap
from gpu_common import say
from llama import PRESETS, Llama
from torch import Tensor, nn

from quartet.backend import compile_graph
from quartet.lowering import registry
from quartet.options import Options
from quartet.passes import pipeline
from quartet.recipes import recipes
from quartet.runtime.capture import Capture
from quartet.runtime.compat import compile_fx

PUBLISHED = {  # recipe → place, from the first, what shares one is said to be on a par; None: no claim to one
    "bf16": (1, "the baseline"),
    "mxfp8": (1, "on a par with BF16 (2506.08027)"),
    "fp8": (1, "on a par with BF16 (2209.05433)"),
    "fp8-delayed": (1, "on a par with BF16 (2209.05433)"),
    "fp8-trillion": (1, "on a par with BF16 (2409.12517)"),
    "fp8-block": (1, "within 0.25 % of BF16's loss (2412.19437)"),
    "int8": (1, "on a par with BF16 (2304.13013)"),
    "quartet2": (2, "ahead of nvfp4 (2601.22813)"),
    "nvfp4": (3, "loss 1 to 1.5 % above FP8's (2509.25149)"),
    "quartet": (4, "ahead of other MXFP4 methods, with the scales of quartet-paper (2505.14669)"),
    "quartet-paper": (4, "ahead of other MXFP4 methods (2505.14669)"),
    "fp8-rowwise": (None, "no claim of its loss (2507.16099)"),
    "tetrajet": (None, "no claim of language models; ahead of other 4-bit methods on images (2502.20853)"),
    "tetrajet-ema": (None, "no claim of language models; ahead of tetrajet on images (2502.20853)"),
    "fp4-dge": (None, "no order among FP4 methods; minimal degradation from BF16 (2501.17116)"),
    **{f"halo-{f}-0": (None, "no claim: the method without its rotations (2501.02625)") for f in ("fp8", "int8")},
    **{f"halo-{f}-{level}": (None, "no claim of pre-training; fine-tunes near full precision (2501.02625)")
       for f in ("fp8", "int8") for level in (1, 2)},
    "int8-all": (None, "no claim: its paper keeps wgrad in 16 bits for the noise (2304.13013)"),
    "bitnet": (None, "no claim at this size; on a par from 3 B parameters on (2402.17764)"),
}
BF16 = common.BASELINE


def quantising() -> list[str]:
    """BF16 and the recipes that quantise products, in the order of the catalogue."""
    return [BF16, *(name for name, recipe in recipes().items() if recipe.quantizes)]


def interpreted(policy: str, model: nn.Module, _: Any = None) -> Any:
    """The model compiled as always, its graphs run op by op."""
    torch._dynamo.config.recompile_limit = 64

    def backend(gm: Any, inputs: Any) -> Any:
        if policy == BF16:
            return compile_fx(gm, inputs, inner_compile=Capture())
        options = Options.parse(None, {"policy": policy}, passes=pipeline.OPTIONAL, kernels=registry.NAMES)
        return compile_graph(gm, inputs, options, inner_compile=Capture())

    return torch.compile(model, backend=backend, dynamic=False, fullgraph=True)


def compiler(args: argparse.Namespace) -> train_gap.Compile:
    if args.interpret:
        return interpreted
    return lambda policy, model, recipe: common.compiled(policy, model, args.compiler, recipe, args.cuda_graphs)


def gradients(policy: str | None, batch: tuple[Tensor, ...], args: argparse.Namespace, draws: int) -> list[Tensor]:
    """Flat gradients of all linear weights in blocks, fp32; without a policy those of the eager model in fp32."""
    torch.manual_seed(0)
    model = Llama(PRESETS[args.size], args.seq).to(args.device)
    run = model if policy is None else compiler(args)(policy, model, None)
    found = []
    for draw in range(draws):
        torch.manual_seed(draw)
        model.zero_grad()
        if policy is None:
            run(*batch).backward()
        else:
            with torch.autocast(args.device.type, torch.bfloat16):
                run(*batch).backward()
        found.append(torch.cat([m.weight.grad.float().flatten() for name, m in model.named_modules()
                                if isinstance(m, nn.Linear) and "head" not in name]))
    return found


def cosine(a: Tensor, b: Tensor) -> float:
    return float(nn.functional.cosine_similarity(a.double(), b.double(), dim=0))


def measure(policy: str, corpus: Any, exact: Tensor, batch: tuple[Tensor, ...],
            args: argparse.Namespace) -> dict[str, Any]:
    """The row of one recipe, or why it failed."""
    try:
        made = gradients(policy, batch, args, args.draws)
        torch._dynamo.reset()
        row = train_gap.train(policy, args.seed, corpus, args, compiler(args))
        mean = torch.stack(made).mean(0)
        return row | {"cosine": cosine(made[0], exact), "mean_cosine": cosine(mean, exact)}
    except Exception as error:
        return {"policy": policy, **common.failure(error)}
    finally:
        torch._dynamo.reset()
        common.release(args.device)


def report(record: common.Record) -> None:
    """Print the rows, the smallest validation loss first."""
    done = sorted((r for r in record.results.values() if "validation_loss" in r), key=lambda r: r["validation_loss"])
    base = next((r["validation_loss"] for r in done if r["policy"] == BF16), None)
    rows = [["recipe", "validation", "gap to bf16", "gradient cosine", "of the mean", "published"]]
    for r in done:
        place, said = PUBLISHED.get(r["policy"], (None, ""))
        gap = "" if base is None else f"{r['validation_loss'] - base:+.4f}"
        rows.append([r["policy"], f"{r['validation_loss']:.4f}", gap, f"{r['cosine']:.4f}", f"{r['mean_cosine']:.4f}",
                     f"{place}. {said}" if place else said])
    rows += [[r["policy"], "failed", "", "", "", ""] for r in record.results.values() if "failed" in r]
    say(common.table(rows))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", type=common.names, default=None, metavar="NAMES", help="default: all, and bf16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draws", type=int, default=16, help="gradients whose mean is compared; default %(default)s")
    training.add_arguments(parser, **train_gap.DEFAULTS)
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--precision", choices=train_gap.PRECISIONS, default="autocast")
    parser.add_argument("--interpret", action="store_true", help="run graphs op by op, without generated code")
    parser.add_argument("--cuda-graphs", action="store_true")
    parser.add_argument("--compiler", default="inductor", help="torch.compile backend of bf16")
    common.add_arguments(parser, "recipe_table", "recipe", again="train")
    args = parser.parse_args(argv)
    args.recipes = args.recipes or quantising()
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    deadline = common.Deadline(args.time_limit)
    corpus = train_gap.read_packages(args.train_bytes, args.validation_bytes)
    record = training.begin(args, "recipe_table", train_gap.SETTINGS, seed=args.seed, interpret=args.interpret)
    batch = tuple(t.to(args.device) for t in corpus.batch("train", args.seed, 0, args.batch, args.seq))
    exact = gradients(None, batch, args, 1)[0]
    for policy in args.recipes:
        if deadline.passed:
            break
        if "validation_loss" not in record.results.get(policy, {}):
            record.put(policy, measure(policy, corpus, exact, batch, args))
    report(record)


if __name__ == "__main__":
    main()
