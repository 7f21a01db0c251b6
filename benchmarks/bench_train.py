"""A whole training step of two Llama shapes with BF16 weights: forward, loss, backward, fused AdamW, 8 × 2048 tokens.

    python benchmarks/bench_train.py
    python benchmarks/bench_train.py --shapes 8b --columns bf16,quartet --together 2 --time-limit 400
    python benchmarks/bench_train.py --profile quartet --shapes 1b

What is measured, how columns run and how a run continues: ``training_columns.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
import training_columns
from llama import Llama, LlamaConfig
from training_columns import Work


def llama(config: LlamaConfig, batch: int = 8, length: int = 2048) -> Work:
    """A model of ``examples/llama.py`` on random tokens, ``batch`` sequences of ``length``."""

    def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        tokens = torch.randint(config.vocabulary, (count, batch, length + 1))
        return [(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in tokens]

    return Work(lambda: Llama(config, length).bfloat16(), batches, lambda model, batch: model(*batch))


WORKS = {
    "1b": llama(LlamaConfig(dim=2048, layers=16, heads=16, ffn=8192, vocabulary=32000)),
    "8b": llama(LlamaConfig(dim=4096, layers=8, heads=32, ffn=14336, vocabulary=32000)),
    "tiny": llama(LlamaConfig(dim=64, layers=1, heads=2, ffn=96), batch=2, length=32),
}


def main(argv: Sequence[str] | None = None) -> None:
    training_columns.main(Path(__file__).resolve(), WORKS, ("8b", "1b"), training_columns.COLUMNS, __doc__, argv)


if __name__ == "__main__":
    main()
