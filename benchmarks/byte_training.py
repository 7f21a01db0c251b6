"""What the benchmarks that train a Llama on bytes share: arguments, the record of a run, and the validation loss."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import gpu_common as common
import torch
from corpus import Corpus
from llama import PRESETS
from torch import Tensor


def add_arguments(parser: argparse.ArgumentParser, *, size: str, steps: int, batch: int, seq: int, train_bytes: int,
                  validation_bytes: int) -> None:
    """How large the model and its training are, with these defaults."""
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--size", choices=PRESETS, default=size, help=f"a preset of examples/llama.py; default {size}")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--seq", type=int, default=seq)
    parser.add_argument("--train-bytes", type=int, default=train_bytes)
    parser.add_argument("--validation-bytes", type=int, default=validation_bytes)


def add_seeds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=lambda text: [int(s) for s in common.names(text)], default=[0], metavar="N,N")


def begin(args: argparse.Namespace, benchmark: str, keys: Sequence[str], **more: Any) -> common.Record:
    """Print and record what the times and losses depend on: the device, the arguments ``keys``, the model, ``more``."""
    settings = common.environment(args.device) | {key: getattr(args, key) for key in keys}
    settings |= {"model": asdict(PRESETS[args.size]), **more}
    common.say(common.describe(settings))
    return common.Record(args.out, benchmark, settings, args.fresh)


def lengths(corpus: Corpus) -> dict[str, int]:
    """The lengths of both texts, as settings."""
    return {"train_text": len(corpus.train), "validation_text": len(corpus.validation)}


def windows(data: Tensor, batch: int, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All of a flat text as tokens and targets [batch, length] that follow each other; an incomplete batch is dropped.

    Raises:
        ValueError: there is not one whole batch.
    """
    count = (len(data) - 1) // (batch * length)
    if count == 0:
        raise ValueError(f"{len(data)} validation bytes are less than one batch of {batch} × {length}; "
                         f"use --validation-bytes {batch * length + 1} or more")
    for i in range(count):
        first = i * batch * length
        tokens, targets = (data[first + k:first + k + batch * length].long().view(batch, length) for k in (0, 1))
        yield tokens, targets


def mean(losses: Sequence[Tensor]) -> float:
    """Of scalars on a device, in one copy and in double precision."""
    return statistics.fmean(torch.stack(list(losses)).double().tolist())
