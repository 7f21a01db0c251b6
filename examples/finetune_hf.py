"""Train a causal language model of Hugging Face by its ``Trainer``, with the matmuls in low precision.

    python examples/finetune_hf.py                                    # a small Llama from scratch, on Python's sources
    python examples/finetune_hf.py --model meta-llama/Llama-3.2-1B --data my.txt --policy fp8
    torchrun --nproc-per-node 2 examples/finetune_hf.py

What differs from a program without quartet is one line and the callback, which keeps the histories of ``fp8-delayed``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from corpus import read_corpus
from output import as_path, require

import quartet

for package in ("transformers", "accelerate"):
    require(package)

from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Trainer, TrainingArguments  # noqa: E402

from quartet.integrations.huggingface import QuartetCallback  # noqa: E402

BYTES = 256  # tokens of the small model


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a name of the hub; default: a small Llama over bytes")
    parser.add_argument("--data", type=as_path, help="a text; default: Python's own sources")
    parser.add_argument("--policy", default="quartet", help="a recipe or a .toml file")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--out", type=as_path, default=Path("finetune-out"))
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    return parser.parse_args()


def load(name: str | None) -> tuple[torch.nn.Module, Callable[[bytes], list[int]]]:
    """The model, and what makes tokens of text."""
    if name is not None:
        tokenizer = AutoTokenizer.from_pretrained(name)
        return AutoModelForCausalLM.from_pretrained(name), lambda text: tokenizer(
            text.decode(errors="replace"))["input_ids"]
    config = LlamaConfig(vocab_size=BYTES, hidden_size=128, intermediate_size=384, num_hidden_layers=1,
                         num_attention_heads=4, num_key_value_heads=4, use_cache=False)
    return AutoModelForCausalLM.from_config(config), list


def rows(tokens: list[int], length: int, most: int) -> list[dict[str, torch.Tensor]]:
    """Up to ``most`` sequences of ``length`` tokens in a row; the model shifts the labels itself."""
    count = min(len(tokens) // length, most)
    return [{"input_ids": row, "labels": row} for row in torch.tensor(tokens[:count * length]).view(count, length)]


def main() -> dict[str, Any]:
    """Train, evaluate, save, and go on writing; returns the losses before and after."""
    arguments = parse_arguments()
    torch.manual_seed(0)
    model, encode = load(arguments.model)
    corpus, most = read_corpus(arguments.data), arguments.steps * arguments.batch
    few = 8 * arguments.seq * 16  # bytes enough for the rows that are read
    train = rows(encode(bytes(corpus.train[:max(few, most * arguments.seq * 8)])), arguments.seq, most)
    validation = rows(encode(bytes(corpus.validation[:few])), arguments.seq, 16)

    trainer = Trainer(
        quartet.compile(model, arguments.policy),
        TrainingArguments(
            str(arguments.out), max_steps=arguments.steps, per_device_train_batch_size=arguments.batch,
            per_device_eval_batch_size=arguments.batch, learning_rate=arguments.lr, warmup_steps=arguments.steps // 10,
            lr_scheduler_type="cosine", bf16=torch.cuda.is_available(), logging_steps=10, save_steps=arguments.steps,
            report_to=[], dataloader_drop_last=True, dataloader_pin_memory=torch.cuda.is_available()),
        train_dataset=train, eval_dataset=validation, callbacks=[QuartetCallback()])
    before = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=arguments.resume)
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(arguments.out / "model"))
    if arguments.model is None and trainer.is_world_process_zero():
        start = torch.tensor([list(b"def ")], device=model.device)
        made = model.eval().generate(start, max_new_tokens=24, do_sample=False, use_cache=False, pad_token_id=0)
        print(repr(bytes(made[0].tolist()).decode(errors="replace")))
    print(f"validation loss {before:.3f} → {after:.3f} nats a token")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main()
