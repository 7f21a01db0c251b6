"""Training on quantised weights alone: validation loss, codes flipped a step and measured bytes, beside two baselines.

    python benchmarks/direct.py
    python benchmarks/direct.py --size small --steps 1000 --columns fp32,bitnet,8,paper-8 --lr 1e-3,3e-3

Every column starts from the same weights and sees the same bytes in the same order: Python source text of the installed
packages, AdamW(.9, .95), weight decay .1 on matrices, clip 1, a tenth of the steps warm-up, then a cosine to a tenth.
With several learning rates the best is shown and all are recorded. The loss is the mean over the same held-out files,
in nats a byte.

Columns are ``fp32``, ``bitnet`` (ternary forward, straight-through, fp32 weights), and grids ``ternary``, 2, 3, 4, 8:
``8`` is ours, ``paper-8`` the paper's rule; ``8+rare``, ``8+never`` other rules for the scales, ``8+feedback`` with
residuals. ``8>ternary`` validates the 8-bit run once more as ternary.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import byte_training as training
import gpu_common as common
import torch
import torch.nn as nn
from byte_training import windows
from corpus import Corpus, read_packages
from descent import decayed, descend, learning_rate
from gpu_common import say
from llama import PRESETS, Llama
from torch import Tensor

from quartet import direct, optim

COLUMN = re.compile(r"(paper-)?(ternary|[2348])(?:\+(rare|never|feedback))?(>ternary)?")
COLUMNS = ("fp32", "bitnet", "ternary", "2", "3", "4", "8", "paper-ternary", "paper-3", "paper-4", "paper-8")
SETTINGS = ("size", "steps", "batch", "seq", "states", "autocast", "train_bytes", "validation_bytes")


def prepared(column: str, model: Llama) -> Llama:
    """The model as the column trains it. Raises ValueError for a column that does not exist."""
    if column == "fp32":
        return model
    if column == "bitnet":
        direct.bitnet(model)
    elif match := COLUMN.fullmatch(column):
        direct.convert(model, match[2], paper=bool(match[1]))
    else:
        raise ValueError(f"there is no column {column!r}; possible: fp32, bitnet, [paper-]ternary|2|3|4|8"
                         "[+rare|+never|+feedback][>ternary]")
    return model


def optimizer_of(column: str, model: Llama, states: str, seed: int) -> torch.optim.Optimizer:
    """AdamW with its groups, wrapped for low-bit weights."""
    adamw = optim.AdamW if states == "fp8" else torch.optim.AdamW
    inner = adamw(decayed(model), lr=1e-3, betas=(0.9, 0.95))
    match = COLUMN.fullmatch(column)
    if match is None:
        return inner
    rescale = {"rare": "rare", "never": None}.get(match[3], "radial")
    return direct.Optimizer(inner, rescale=rescale, feedback=match[3] == "feedback",
                            generator=torch.Generator().manual_seed(seed))


def state_bytes(optimizer: torch.optim.Optimizer, model: Llama) -> float:
    """Bytes of optimizer states a parameter of the trained linear layers."""
    inside = {id(layer.weight): layer.weight for name, layer in model.named_modules()
              if isinstance(layer, nn.Linear) and name not in common.HEADS}
    stored = sum(x.nbytes for p, state in optimizer.state.items() if id(p) in inside
                 for x in state.values() if isinstance(x, Tensor) and x.dim())
    return stored / sum(p.numel() for p in inside.values())


def validate(loss_of: Callable[..., Tensor], corpus: Corpus, args: argparse.Namespace) -> float:
    with torch.no_grad():
        return training.mean([loss_of(*batch) for batch in windows(corpus.validation, args.batch, args.seq)])


def train(column: str, lr: float, seed: int, corpus: Corpus, args: argparse.Namespace) -> dict[str, Any]:
    """Train one model to the end."""
    device: torch.device = args.device
    torch.manual_seed(seed)
    model = prepared(column, Llama(PRESETS[args.size], args.seq).to(device))
    optimizer = optimizer_of(column, model, args.states, seed)
    run: Callable[..., Tensor] = model
    if args.compiler != "none":
        backend = common.our_backend() if args.compiler == "quartet" else args.compiler
        options = {"policy": common.BASELINE} if args.compiler == "quartet" else None
        run = torch.compile(model, backend=backend, options=options, dynamic=False)

    def loss_of(*batch: Tensor) -> Tensor:
        context = torch.autocast(device.type, torch.bfloat16) if args.autocast else contextlib.nullcontext()
        with context:
            return run(*(t.to(device) for t in batch))

    losses, flips, began = [], [], math.nan
    for step in range(args.steps):
        if step == 1:
            common.synchronize(device)
            began = time.perf_counter()
        loss = loss_of(*corpus.batch("train", seed, step, args.batch, args.seq))
        descend(model, optimizer, loss, learning_rate(step, args.steps, lr))
        losses.append(loss.detach())
        if isinstance(optimizer, direct.Optimizer) and step % 10 == 0:
            flips.append(optimizer.flipped())
    common.synchronize(device)
    step_ms = 1e3 * (time.perf_counter() - began) / max(1, args.steps - 1)
    found = direct.weight_bytes(model)
    result = {
        "column": column, "seed": seed, "lr": lr, "validation_loss": validate(loss_of, corpus, args),
        "train_loss": [round(x, 5) for x in torch.stack(losses).float().tolist()][:: max(1, args.steps // 50)],
        "flipped": statistics.fmean(flips) if flips else None, "step_ms": step_ms,
        "weight_bytes": found["bytes_per_parameter"] if found["low_bit_parameters"] else 4.0,
        "state_bytes": state_bytes(optimizer, model),
        "parameters": sum(p.numel() for p in model.parameters()), "low_bit_parameters": found["low_bit_parameters"],
    }
    if column.endswith(">ternary"):
        direct.ternarize(model)
        run = model
        result["as_ternary"] = validate(loss_of, corpus, args)
    return result


def report(record: common.Record, columns: Sequence[str]) -> None:
    """A row a column: the loss at its best learning rate, mean over the seeds."""
    rows = [["column", "validation", "to bitnet", "lr", "seeds", "flipped", "weight B", "states B", "step ms"]]
    best: dict[str, dict[str, Any]] = {}
    for column in columns:
        own = [r for r in record.results.values() if r.get("column") == column and "validation_loss" in r]
        rates = {lr: [r for r in own if r["lr"] == lr] for lr in {r["lr"] for r in own}}
        if rates:
            lr, runs = min(rates.items(), key=lambda item: statistics.fmean(r["validation_loss"] for r in item[1]))
            mean = {k: statistics.fmean(r[k] for r in runs) for k in ("validation_loss", "weight_bytes", "state_bytes",
                                                                      "step_ms")}
            flipped = [r["flipped"] for r in runs if r["flipped"] is not None]
            best[column] = mean | {"lr": lr, "seeds": len(runs)}
            best[column]["flipped"] = statistics.fmean(flipped) if flipped else None
    base = best.get("bitnet", {}).get("validation_loss")
    for column in columns:
        if (b := best.get(column)) is None:
            rows.append([column, "failed or not run", *[""] * 7])
            continue
        rows.append([column, f"{b['validation_loss']:.4f}", f"{b['validation_loss'] / base - 1:+.1%}" if base else "",
                     f"{b['lr']:g}", str(b["seeds"]), "" if b["flipped"] is None else f"{b['flipped']:.2%}",
                     f"{b['weight_bytes']:.3f}", f"{b['state_bytes']:.2f}", f"{b['step_ms']:.1f}"])
    record.save(best=best)
    say(common.table(rows))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=common.names, default=list(COLUMNS), metavar="NAMES",
                        help=f"default {','.join(COLUMNS)}")
    training.add_seeds(parser)
    training.add_arguments(parser, size="tiny", steps=300, batch=16, seq=128, train_bytes=8_000_000,
                           validation_bytes=(1 << 17) + 1)
    parser.add_argument("--lr", type=lambda text: [float(s) for s in common.names(text)], default=[3e-3], metavar="X,X")
    parser.add_argument("--states", choices=("fp32", "fp8"), default="fp32", help="of AdamW; fp8: quartet.optim's")
    parser.add_argument("--autocast", action="store_true", help="bf16 autocast")
    parser.add_argument("--compiler", choices=("none", "inductor", "quartet"), default="none")
    common.add_arguments(parser, "direct", "column", again="train")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    deadline = common.Deadline(args.time_limit)
    corpus = read_packages(args.train_bytes, args.validation_bytes)
    record = training.begin(args, "direct", SETTINGS, **training.lengths(corpus), compiler=args.compiler)
    for seed in args.seeds:
        for column in args.columns:
            for lr in args.lr:
                key = f"{column}/{lr:g}/{seed}"
                if deadline.passed or "validation_loss" in record.results.get(key, {}):
                    continue
                try:
                    result = train(column, lr, seed, corpus, args)
                    outcome = f"validation {result['validation_loss']:.4f}, step {result['step_ms']:.1f} ms"
                    outcome += f", as ternary {result['as_ternary']:.4f}" if "as_ternary" in result else ""
                except Exception as error:
                    result = {"column": column, "lr": lr, "seed": seed, **common.failure(error)}
                    outcome = result["failed"]
                finally:
                    common.release(args.device)
                record.put(key, result)
                say(f"  {key}: {outcome}")
    report(record, args.columns)


if __name__ == "__main__":
    main()
