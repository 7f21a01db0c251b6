"""The system of arXiv 2409.12517 in one program: delayed FP8 scaling, Smooth-SwiGLU, and Adam with FP8 states.

    python examples/fp8_trillion.py
    python examples/fp8_trillion.py --outlier 30
    python examples/fp8_trillion.py --checkpoint run-{step}.pt && python examples/fp8_trillion.py --resume run-100.pt

Three runs from the same weights take turns on the same bytes: the system (``fp8-trillion``), the same without
smoothing (``fp8-delayed``), and ``torch.optim.AdamW`` under plain Inductor in the model's own precision. At the end:
validation losses, bytes of the optimizer's states and of what is kept for backward, and how far the gradients are from
those of the same weights without quantisation. A checkpoint holds the histories of the scales too, so a resumed run
goes on bit for bit.

``--outlier`` plants what the paper found after 200 billion tokens: in each feed-forward one channel whose gate and up
weights are the same vector, here that many times longer than the others.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from console import Console, Table
from descent import adamw, decayed
from llama import FeedForward, Llama
from outcome import plot, save, show
from torch import Tensor
from train_llama import (
    BASELINE,
    Run,
    add_arguments,
    announce,
    check,
    measure,
    on_device,
    prepare,
    train,
)

from quartet import optim

SYSTEM, UNSMOOTHED = "fp8-trillion", "fp8-delayed"
CHANNEL = 0
ERROR_BATCHES = 8


@dataclass(frozen=True)
class GradientErrors:
    """Relative errors of a run's gradients, ‖G − exact‖ / ‖exact‖.

    Attributes:
        all: of all parameters together.
        down: of the feed-forwards' last weights alone, mean over the layers.
        others: of those without the planted channel.
    """

    all: float
    down: float
    others: float


@torch.no_grad()
def plant(model: Llama, factor: float) -> None:
    """Make channel 0 of every feed-forward an outlier: gate and up the same vector, ``factor`` times longer."""
    for module in model.modules():
        if isinstance(module, FeedForward):
            gate, up = module.gate_proj.weight, module.up_proj.weight
            gate[CHANNEL] *= factor
            up[CHANNEL] = gate[CHANNEL]


def make_runs(args: argparse.Namespace, model: Llama) -> list[Run]:
    """The system, the same without Smooth-SwiGLU, and the baseline, on copies of one model."""
    runs = []
    for policy in (SYSTEM, UNSMOOTHED) if args.compare else (SYSTEM,):
        own = copy.deepcopy(model)
        optimizer = optim.AdamW(decayed(own), lr=args.lr, betas=(0.9, 0.95), state_format=("e4m3", "e5m2"))
        compiled = torch.compile(own, backend="quartet", options={"policy": policy})
        runs.append(Run(policy, own, compiled, optimizer))
    if args.compare:
        runs.append(Run(BASELINE, model, torch.compile(model), adamw(model, args.lr)))
    return runs


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def gradient_errors(run: Run, batches: Sequence[tuple[Tensor, Tensor]]) -> GradientErrors:
    """How far the gradients of some batches are from those that the run's weights have in eager PyTorch.

    Before a first step this is what compiles, and is timed as such.
    """
    off: dict[str, Tensor] = {}
    size: dict[str, Tensor] = {}
    for batch in batches:
        exact = gradients(run.model, run.model(*batch))
        start = time.perf_counter()
        found = gradients(run.model, run.compiled(*batch))
        if math.isnan(run.first_step):
            run.first_step = time.perf_counter() - start
        for name, g in exact.items():  # squares by channel
            for sums, t in ((off, found[name] - g), (size, g)):
                sums[name] = sums.get(name, 0) + t.double().square().reshape(-1, t.shape[-1]).sum(0)

    def error(names: Iterable[str], first: int = 0) -> float:
        apart, whole = (sum(sums[n][first:].sum().item() for n in names) for sums in (off, size))
        return float((apart / whole) ** 0.5)

    down = [name for name in size if name.endswith("down_proj.weight")]
    return GradientErrors(error(list(size)), sum(error([n]) for n in down) / len(down),
                          sum(error([n], CHANNEL + 1) for n in down) / len(down))


def show_errors(errors: dict[str, dict[str, GradientErrors]], console: Console) -> None:
    table = Table(title="relative error of the gradients")
    for name in ("", "all", "down_proj", f"down_proj but channel {CHANNEL}"):
        table.add_column(name, justify="right" if name else "left")
    for when, runs in errors.items():
        for name, e in runs.items():
            table.add_row(f"{name}, {when}", f"{e.all:.2%}", f"{e.down:.2%}", f"{e.others:.2%}")
    console.print(table)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "tiny", 500, "fp8-trillion-out")
    parser.add_argument("--outlier", type=float, nargs="?", const=30.0, metavar="FACTOR",
                        help="plant a channel of aligned gate and up weights, this many times longer (30)")
    args = parser.parse_args(argv)
    check(parser, args)
    args.stop_at = min(args.stop_at or args.steps, args.steps)
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    config, corpus, console, described = prepare(args, "outlier")
    model = Llama(config, args.seq).to(args.device)
    if args.outlier:
        plant(model, args.outlier)
    runs = make_runs(args, model)
    announce(model, corpus, args, console)
    batches, errors = [on_device(corpus, "validation", args, i) for i in range(ERROR_BATCHES)], {}
    if args.resume is None:
        errors["at the start"] = {run.name: gradient_errors(run, batches) for run in runs}
    train(runs, corpus, args, described, console)
    described |= {"device": args.device}
    save(args.out / "result.json", runs, described)  # before anything else can fail
    errors["at the end"] = {run.name: gradient_errors(run, batches) for run in runs}
    measure(runs, corpus, args)
    result = save(args.out / "result.json", runs, described | {
        "gradient_errors": {when: {name: vars(e) for name, e in found.items()} for when, found in errors.items()}})
    show(runs, console)
    show_errors(errors, console)
    plot(runs, args.out / "loss.png")
    return result


if __name__ == "__main__":
    main()
