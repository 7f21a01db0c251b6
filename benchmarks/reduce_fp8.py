"""Whether a model trains to the same loss if its gradients are reduced in FP8, with error feedback and without.

    python benchmarks/reduce_fp8.py --ranks 4 --steps 300 --seeds 4 --out reduce.json

One process plays all ranks of data parallelism: the demo's Llama on its text, a micro-batch a rank, and a reduction of
the ranks' gradients Gᵢ [parameters]. FP8 codes are summed in fp32 (an all-to-all, then a sum, as low-bit reductions are
built), so each gradient is rounded once; BF16 is a ring, which rounds each partial sum.

    plain          G = Σᵢ D(Q(Gᵢ))
    with feedback  G = Σᵢ D(Q(Gᵢ + Rᵢ)),   Rᵢ ← Gᵢ + Rᵢ − D(Q(Gᵢ + Rᵢ))        (arXiv 1901.09847)

Runs of a seed have one start and one order of batches. What counts is the validation loss less that of the fp32
reduction of the same seed, beside that of BF16: how far rounding alone moves a run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from corpus import Corpus, read_corpus  # noqa: E402
from llama import PRESETS, Llama  # noqa: E402

VALIDATION = 16  # batches
E4M3 = torch.float8_e4m3fn
Round = Callable[[Tensor], Tensor]


def fp8(gradient: Tensor, block: int | None = None) -> Tensor:
    """D(Q(·)): E4M3 with an fp32 scale for the tensor, or for each ``block`` elements of it as it is stored."""
    size = block or gradient.numel()
    rows = F.pad(gradient.flatten(), (0, -gradient.numel() % size)).view(-1, size)
    scale = rows.abs().amax(1, keepdim=True).clamp_min(1e-30) / torch.finfo(E4M3).max
    return ((rows / scale).to(E4M3).float() * scale).flatten()[:gradient.numel()].view_as(gradient)


def ring(gradients: list[Tensor]) -> Tensor:
    """Sum in BF16, each partial sum rounded."""
    total, *others = (gradient.bfloat16() for gradient in gradients)
    for gradient in others:
        total = total + gradient
    return total.float()


@dataclass(frozen=True)
class Reduction:
    """How the gradients of the ranks become one; ``bytes`` an element on the wire."""

    bytes: float
    round: Round | None = None
    feedback: bool = False
    bf16: bool = False

    def __call__(self, gradients: list[Tensor], kept: list[Tensor]) -> Tensor:
        """Their sum; ``kept`` is what each rank has left out so far, written anew."""
        if self.bf16:
            return ring(gradients)
        if self.round is None:
            return torch.stack(gradients).sum(0)
        total = torch.zeros_like(gradients[0])
        for gradient, left in zip(gradients, kept, strict=True):
            wanted = gradient + left if self.feedback else gradient
            sent = self.round(wanted)
            if self.feedback:
                left.copy_(wanted - sent)
            total += sent
        return total


def by_block(gradient: Tensor) -> Tensor:
    return fp8(gradient, 128)


REDUCTIONS = {
    "fp32": Reduction(4), "bf16": Reduction(2, bf16=True),
    "fp8 tensor": Reduction(1, fp8), "fp8 tensor, feedback": Reduction(1, fp8, feedback=True),
    "fp8 block": Reduction(1 + 4 / 128, by_block), "fp8 block, feedback": Reduction(1 + 4 / 128, by_block, True)}


def train(reduction: Reduction, seed: int, args: argparse.Namespace, corpus: Corpus) -> float:
    """Validation loss in nats a byte."""
    torch.manual_seed(seed)
    model = Llama(PRESETS[args.size], args.seq)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.1)
    kept = [[torch.zeros_like(p) for p in parameters] for _ in range(args.ranks)]
    for step in range(args.steps):
        micro = []
        for rank in range(args.ranks):
            tokens, targets = corpus.batch("train", seed, step * args.ranks + rank, args.batch, args.seq)
            loss = model(tokens, targets) / args.ranks
            micro.append(torch.autograd.grad(loss, parameters))
        for i, parameter in enumerate(parameters):
            parameter.grad = reduction([grads[i] for grads in micro], [left[i] for left in kept])
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        batches = (corpus.batch("validation", 0, i, 16, args.seq) for i in range(VALIDATION))
        return statistics.fmean(model(*batch).item() for batch in batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("ranks", 4), ("steps", 300), ("first-seed", 0), ("seeds", 4), ("batch", 4), ("seq", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--size", choices=PRESETS, default="tiny")
    parser.add_argument("--out", type=Path, default=Path("reduce.json"))
    args = parser.parse_args()
    corpus, losses = read_corpus(), {name: list[float]() for name in REDUCTIONS}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for name, reduction in REDUCTIONS.items():
            start = time.perf_counter()
            losses[name].append(train(reduction, seed, args, corpus))
            print(f"seed {seed}  {name:21} {losses[name][-1]:.4f}  {time.perf_counter() - start:.0f} s", flush=True)
        args.out.write_text(json.dumps({"torch": torch.__version__, "args": vars(args), "losses": losses}, default=str))
    print(f"\n{'reduction':21}  bytes   loss   less that of fp32: mean  spread of seeds")
    for name, found in losses.items():
        apart = [a - b for a, b in zip(found, losses["fp32"], strict=True)]
        spread = statistics.stdev(apart) if len(apart) > 1 else float("nan")
        print(f"{name:21}  {REDUCTIONS[name].bytes:5.2f}  {statistics.fmean(found):.4f}  {statistics.fmean(apart):+.4f}"
              f"  {spread:.4f}")


if __name__ == "__main__":
    main()
