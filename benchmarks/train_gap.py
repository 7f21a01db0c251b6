"""What low precision costs in training: the validation loss of a 25M-parameter Llama under several policies.

    python benchmarks/train_gap.py
    python benchmarks/train_gap.py --policies bf16,quartet,nearest-rms-sr --seeds 0,1 --jobs 3 --time-limit 480

Every policy starts from the same weights and sees the same bytes in the same order: Python source text of the
installed packages, 64 sequences of 512 bytes a step, 1000 steps of AdamW at 1.2e-3 (.9, .95, weight decay .1, clip 1),
a tenth of them warm-up, then a cosine to a tenth. By default the weights are fp32 under bf16 autocast. The loss is the
mean over the same 1 MiB of held-out files, in nats a byte, through the forward that was trained.

Policies are ``bf16`` (plain Inductor), recipe names, and variants of ``quartet`` as FORWARD-BACKWARD:

    floor-guarded-nearest    power of two by floor|nearest, deviation centred|guarded|rms, backward sr|nearest|bf16
    ceil-sr                  forward scales from the largest magnitude, no clipping
    even-sr                  forward scales by the rule ``even``, gradients straight through
    even-signed-sr           any of them with fixed signs before the rotation of forward

``even-signed-sr`` is ``quartet``, ``floor-centred-sr`` is ``quartet-paper``. After a recipe or ``bf16`` may stand how
activations are saved, ``quartet+e4m3/16``, ``bf16+uint4/64 stochastic`` (``quartet.lowering.recipe.types.Saved``). Gaps
are between runs of one seed, and have their standard deviation over the seeds beside them. A run continues the file at
``--out``.
"""

from __future__ import annotations

import argparse
import concurrent.futures as futures
import contextlib
import math
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import byte_training as training
import gpu_common as common
import torch
import torch.nn as nn
from byte_training import windows
from corpus import Corpus, read_packages
from descent import adamw, descend, learning_rate
from gpu_common import say
from llama import PRESETS, Llama
from torch import Tensor

VARIANT = re.compile(r"(?:(floor|nearest)-(centred|guarded|rms)|(ceil|even))(-signed)?-(sr|nearest|bf16)")
POLICIES = ("bf16", "quartet", "fp8", "fp8-rowwise", "quartet-paper", "floor-guarded-nearest", "floor-rms-sr",
            "nearest-guarded-sr", "floor-guarded-sr", "floor-guarded-bf16", "nearest-rms-sr", "nearest-rms-nearest",
            "ceil-sr", "even-sr")
PRECISIONS = ("autocast", "bf16", "fp32")
DEFAULTS = {"size": "demo", "steps": 1000, "batch": 64, "seq": 512, "train_bytes": 33_000_000,
            "validation_bytes": (1 << 20) + 1}
SETTINGS = ("size", "steps", "batch", "seq", "lr", "precision", "train_bytes", "validation_bytes")


def variant(name: str) -> Any:
    """The recipe that a variant's name describes; None for any other name."""
    if (match := VARIANT.fullmatch(name)) is None:
        return None
    from quartet.kernels.reference.hadamard import FLAT_SIGNS
    from quartet.lowering.recipe.types import Rotation
    from quartet.recipes import recipes

    base = recipes()["quartet"]
    power, sigma, largest, signed, backward = match.groups()
    forward = ({"rule": largest, "mask": False} if largest else
               {"rule": "quest", "sigma": sigma, "power": power, "mask": True})
    fprop = replace(_respecify(base.fprop, **forward), rotation=Rotation(32, FLAT_SIGNS if signed else "none"))
    recipe = replace(base, name=name, summary="a variant of quartet", fprop=fprop)
    if backward == "bf16":
        return recipe.only({"fprop"})
    rounding = {"sr": "stochastic", "nearest": "nearest"}[backward]
    return replace(recipe, **{role: _respecify(getattr(base, role), rounding=rounding) for role in ("dgrad", "wgrad")})


def saving(name: str) -> Any:
    """The policy that ``RECIPE+FORMAT`` describes, which is about saved activations; None for any other name."""
    base, plus, form = name.partition("+")
    if not plus:
        return None
    from quartet import Policy
    from quartet.lowering.recipe.types import Recipe, Saved

    policy = Policy(None if base == common.BASELINE else base)
    return policy.on(op="saved", recipe=Recipe(f"saved-{form}".replace(" ", "-"), saved=Saved.parse(form)))


def _respecify(gemm: Any, **fields: Any) -> Any:
    """A GEMM with some fields of both quantisers replaced."""
    return replace(gemm, **{side: replace(operand, spec=replace(operand.spec, **fields))
                            for side, operand in (("a", gemm.a), ("b", gemm.b))})


Compile = Callable[[str, nn.Module, Any], Any]  # policy, model, the recipe or policy of a variant


def train(policy: str, seed: int, corpus: Corpus, args: argparse.Namespace,
          compile: Compile | None = None) -> dict[str, Any]:
    """Train one model to the end; its losses and times. ``compile``: instead of ``gpu_common.compiled``."""
    device: torch.device = args.device
    torch.manual_seed(seed)
    model = Llama(PRESETS[args.size], args.seq).to(device)
    if args.precision == "bf16":
        model = model.bfloat16()
    optimizer = adamw(model, args.lr)
    recipe, saved = variant(policy), saving(policy)
    compiled = (common.compiled(policy, model, args.compiler, recipe or saved, args.cuda_graphs)
                if compile is None else compile(policy, model, recipe or saved))

    def loss_of(*batch: Tensor) -> Tensor:
        if device.type == "cuda":  # from pinned memory the copy does not wait for the step before it
            batch = tuple(t.pin_memory().to(device, non_blocking=True) for t in batch)
        autocast = torch.autocast(device.type, torch.bfloat16) if args.precision == "autocast" else None
        torch.compiler.cudagraph_mark_step_begin()
        with autocast or contextlib.nullcontext():
            return compiled(*batch)

    losses, began, compile_s = [], time.perf_counter(), math.nan
    for step in range(args.steps):
        loss = loss_of(*corpus.batch("train", seed, step, args.batch, args.seq))
        descend(model, optimizer, loss, learning_rate(step, args.steps, args.lr))
        losses.append(loss.detach().clone())
        if (step + 1) % max(1, args.steps // 4) == 0:
            say(f"    {policy} seed {seed} step {step + 1}: {loss.item():.3f}")
        if step == 0:
            common.synchronize(device)
            compile_s = time.perf_counter() - began
            began = time.perf_counter()
    common.synchronize(device)
    step_ms = 1e3 * (time.perf_counter() - began) / max(1, args.steps - 1)
    validation = [loss_of(*batch).detach().clone() for batch in windows(corpus.validation, args.batch, args.seq)]
    curve = torch.stack(losses).float().tolist()
    each = max(1, args.steps // 50)
    return {
        "policy": policy, "seed": seed, "validation_loss": training.mean(validation),
        "validation_tokens": len(validation) * args.batch * args.seq,
        "train_loss": [round(statistics.fmean(curve[i:i + each]), 5) for i in range(0, len(curve), each)],
        "step_ms": step_ms, "compile_s": compile_s, "parameters": sum(p.numel() for p in model.parameters()),
        "recipe": asdict(recipe) if recipe is not None else saved.to_dict() if saved is not None else policy,
    }


def attempt(policy: str, seed: int, corpus: Corpus | Path, args: argparse.Namespace) -> dict[str, Any]:
    """``train``, or why it failed. A path is a file of the corpus, for another process."""
    try:
        if isinstance(corpus, Path):
            corpus = Corpus(**torch.load(corpus, weights_only=True))
        return train(policy, seed, corpus, args)
    except Exception as error:
        return {"policy": policy, "seed": seed, **common.failure(error)}
    finally:
        common.release(args.device)


def finish(todo: Sequence[tuple[str, int]], corpus: Corpus, args: argparse.Namespace,
           deadline: common.Deadline) -> Iterator[dict[str, Any]]:
    """The result of each (policy, seed), as it comes; nothing starts after the deadline."""
    if args.jobs == 1:
        for policy, seed in todo:
            if deadline.passed:
                return
            yield attempt(policy, seed, corpus, args)
        return
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(max(1, (os.cpu_count() or 1) // args.jobs))
    waiting, running = list(todo), set()
    spawn = multiprocessing.get_context("spawn")
    with (tempfile.TemporaryDirectory() as folder,
          futures.ProcessPoolExecutor(args.jobs, mp_context=spawn, max_tasks_per_child=1) as pool):
        file = Path(folder, "corpus.pt")
        torch.save(vars(corpus), file)
        while running or (waiting and not deadline.passed):
            while waiting and len(running) < args.jobs and not deadline.passed:
                running.add(pool.submit(attempt, *waiting.pop(0), file, args))
            done, running = futures.wait(running, return_when=futures.FIRST_COMPLETED)
            for future in done:
                yield future.result()


def report(record: common.Record, policies: Sequence[str]) -> None:
    """Print a row a policy: mean validation loss over the seeds, and the mean gap to BF16 of the same seed and its
    standard deviation."""
    done = [r for r in record.results.values() if "validation_loss" in r]
    baseline = {r["seed"]: r["validation_loss"] for r in done if r["policy"] == common.BASELINE}
    rows, gaps = [["policy", "validation", "gap to bf16", "deviation", "seeds", "step ms", "compile s"]], {}
    for policy in policies:
        own = [r for r in done if r["policy"] == policy]
        if not own:
            failed = any(r["policy"] == policy for r in record.results.values())
            rows.append([policy, "failed" if failed else "not run", "", "", "", "", ""])
            continue
        gap = [r["validation_loss"] - baseline[r["seed"]] for r in own if r["seed"] in baseline]
        gaps[policy] = statistics.fmean(gap) if gap else None
        means = {key: statistics.fmean(r[key] for r in own) for key in ("validation_loss", "step_ms", "compile_s")}
        rows.append([policy, f"{means['validation_loss']:.4f}", f"{gaps[policy]:+.4f}" if gap else "",
                     f"{statistics.stdev(gap):.4f}" if len(gap) > 1 else "", str(len(own)),
                     f"{means['step_ms']:.1f}", f"{means['compile_s']:.1f}"])
    record.save(gaps=gaps)
    say(common.table(rows))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", type=common.names, default=list(POLICIES), metavar="NAMES",
                        help=f"default {','.join(POLICIES)}")
    training.add_seeds(parser)
    training.add_arguments(parser, **DEFAULTS)
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--precision", choices=PRECISIONS, default="autocast",
                        help="fp32 weights under bf16 autocast (default), everything bf16, everything fp32")
    parser.add_argument("--jobs", type=int, default=1, help="policies that train at the same time, in own processes")
    parser.add_argument("--cuda-graphs", action="store_true", help="through CUDA graphs: such a small model waits "
                        "for the host otherwise")
    parser.add_argument("--compiler", default="inductor", help="torch.compile backend of bf16")
    common.add_arguments(parser, "train_gap", "policy", again="train")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    deadline = common.Deadline(args.time_limit)
    corpus = read_packages(args.train_bytes, args.validation_bytes)
    record = training.begin(args, "train_gap", SETTINGS, **training.lengths(corpus), compiler=args.compiler,
                            cuda_graphs=args.cuda_graphs)
    todo = [(policy, seed) for seed in args.seeds for policy in args.policies
            if "validation_loss" not in record.results.get(f"{policy}/{seed}", {})]
    for result in finish(todo, corpus, args, deadline):
        record.put(f"{result['policy']}/{result['seed']}", result)
        name, outcome = f"{result['policy']} seed {result['seed']}", result.get("failed")
        say(f"  {name}: " + (outcome or f"validation {result['validation_loss']:.4f}, "
                                        f"step {result['step_ms']:.1f} ms, first {result['compile_s']:.1f} s"))
    report(record, args.policies)


if __name__ == "__main__":
    main()
