"""A training step of unmodified Hugging Face models as a user writes it: ``torch.compile(model)``, BF16 weights, AdamW.

    python benchmarks/bench_hf.py
    python benchmarks/bench_hf.py --shapes llama-1b --together 5 --time-limit 400
    python benchmarks/bench_hf.py --profile quartet --shapes vit-l

``llama-1b`` is the shape of Llama 3.2 1B on 4 × 2048 tokens, ``vit-l`` ViT-L/16 on 128 images of 224², ``qwen3-moe``
six layers of Qwen3-MoE with 32 experts of 1536, four a token, on 8 × 2048 tokens; weights and data are random. ``auto``
is the default policy. What is measured, how columns run and how a run continues: ``training_columns.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import gpu_common as common
import torch
import torch.nn as nn
import training_columns
from training_columns import Work

COLUMNS = (common.BASELINE, "torchao", "fp8", "quartet", "auto")


def _model(architecture: str, **sizes: Any) -> nn.Module:
    """A Transformers model of BF16 weights in training mode, made from its configuration."""
    import transformers

    config = getattr(transformers, f"{architecture.partition('For')[0]}Config")(**sizes)
    return getattr(transformers, architecture)(config).bfloat16().train()


def causal(architecture: str, batch: int, length: int, vocab_size: int, **sizes: Any) -> Work:
    """A language model on random tokens, with the loss that it computes itself."""
    sizes |= {"vocab_size": vocab_size, "use_cache": False, "attn_implementation": "sdpa"}
    return Work(lambda: _model(architecture, **sizes),
                lambda count: list(torch.randint(vocab_size, (count, batch, length))),
                lambda model, tokens: model(input_ids=tokens, labels=tokens).loss, whole=False)


def classifier(architecture: str, batch: int, image_size: int, num_labels: int, **sizes: Any) -> Work:
    """An image classifier on random images, with the loss that it computes itself."""

    def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(torch.randn(batch, 3, image_size, image_size).bfloat16(), torch.randint(num_labels, (batch,)))
                for _ in range(count)]

    return Work(lambda: _model(architecture, image_size=image_size, num_labels=num_labels, **sizes), batches,
                lambda model, batch: model(pixel_values=batch[0], labels=batch[1]).loss, whole=False)


WORKS = {
    "llama-1b": causal("LlamaForCausalLM", 4, 2048, 128256, hidden_size=2048, num_hidden_layers=16,
                       num_attention_heads=32, num_key_value_heads=8, intermediate_size=8192, tie_word_embeddings=True),
    "vit-l": classifier("ViTForImageClassification", 128, 224, 1000, hidden_size=1024, num_hidden_layers=24,
                        num_attention_heads=16, intermediate_size=4096),
    "qwen3-moe": causal("Qwen3MoeForCausalLM", 8, 2048, 32000, hidden_size=2048, num_hidden_layers=6,
                        num_attention_heads=16, num_key_value_heads=4, intermediate_size=6144,
                        moe_intermediate_size=1536, num_experts=32, num_experts_per_tok=4),
    "tiny-llama": causal("LlamaForCausalLM", 2, 64, 128, hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=1, intermediate_size=96),
    "tiny-vit": classifier("ViTForImageClassification", 2, 32, 10, hidden_size=64, num_hidden_layers=1,
                           num_attention_heads=2, intermediate_size=96),
}


def main(argv: Sequence[str] | None = None) -> None:
    training_columns.main(Path(__file__).resolve(), WORKS, ("llama-1b", "vit-l", "qwen3-moe"), COLUMNS, __doc__, argv)


if __name__ == "__main__":
    main()
