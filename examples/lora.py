"""LoRA of PEFT over a frozen base whose products are quantised; only the adapters are trained and saved.

    python examples/lora.py                                           # a small Llama, on Python's sources
    python examples/lora.py --model meta-llama/Llama-3.2-1B --policy fp8
    python examples/lora.py --codes 8                                 # the base exists as INT8 codes only

A frozen weight has no gradient, so of its three products the forward and the input gradient are left, and both are
quantised. The adapters contract so few elements that they stay in the model's dtype.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from corpus import read_corpus
from output import as_path, require

import quartet
from quartet import direct

for package in ("transformers", "peft"):
    require(package)

from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: E402

BYTES = 256


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a name of the hub, read as bytes here; default: a small Llama")
    parser.add_argument("--policy", default="quartet", help="a recipe")
    parser.add_argument("--codes", type=int, choices=(2, 3, 4, 8), help="keep the base as codes of so many bits only")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--out", type=as_path, default=Path("lora-out"))
    return parser.parse_args()


def base(name: str | None) -> torch.nn.Module:
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name)
    return AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=BYTES, hidden_size=128, intermediate_size=384, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, use_cache=False))


def main() -> list[float]:
    """Train the adapters, save them; returns the losses in nats a byte."""
    arguments = parse_arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = base(arguments.model).to(device)
    if arguments.codes is not None:
        direct.convert(model, bits=arguments.codes)
    model = get_peft_model(model, LoraConfig(r=arguments.rank, target_modules="all-linear"))
    model.print_trainable_parameters()
    quartet.compile(model, quartet.Policy(arguments.policy).on("*lora_*", None))

    corpus, losses = read_corpus(), []
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=arguments.lr)
    for step in range(arguments.steps):
        tokens, _ = corpus.batch("train", 0, step, arguments.batch, arguments.seq)
        loss = model(input_ids=tokens.to(device), labels=tokens.to(device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 0 or step == arguments.steps - 1:
            print(f"step {step:4d}  loss {losses[-1]:.3f}")
    model.save_pretrained(arguments.out)
    print(f"the adapters are in {arguments.out}")
    return losses


if __name__ == "__main__":
    main()
