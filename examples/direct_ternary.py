"""Train a small Llama whose linear weights are −1, 0 and 1 alone, generate text with it, export it, read it back.

    python examples/direct_ternary.py
    python examples/direct_ternary.py --bits 8 --size small --steps 1000 --out model.safetensors

The weights take two bits each, their AdamW states a byte each (FP8), and no copy in higher precision exists.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from corpus import Corpus, read_corpus
from descent import decayed, descend, learning_rate
from llama import PRESETS, Llama
from output import as_path, check_folder, require

from quartet import direct, optim

VALIDATION_BATCHES = 16


def build(args: argparse.Namespace) -> tuple[Llama, direct.Optimizer]:
    """A converted model, and AdamW with FP8 states around it."""
    torch.manual_seed(args.seed)
    model = Llama(PRESETS[args.size], args.seq).to(args.device)
    direct.convert(model, args.bits)
    return model, direct.Optimizer(optim.AdamW(decayed(model), lr=args.lr, betas=(0.9, 0.95)))


def train(model: Llama, optimizer: direct.Optimizer, corpus: Corpus, args: argparse.Namespace) -> list[float]:
    """The losses, in nats a byte."""
    run = torch.compile(model, backend="quartet") if args.compile else model
    losses = []
    for step in range(args.steps):
        loss = run(*(t.to(args.device) for t in corpus.batch("train", args.seed, step, args.batch, args.seq)))
        descend(model, optimizer, loss, learning_rate(step, args.steps, args.lr))
        losses.append(loss.item())
        if (step + 1) % max(1, args.steps // 10) == 0:
            print(f"step {step + 1}: loss {losses[-1]:.3f}, {optimizer.flipped():.2%} of the codes flipped", flush=True)
    return losses


@torch.no_grad()
def validate(model: Llama, corpus: Corpus, args: argparse.Namespace) -> float:
    """The mean loss of validation batches, in nats a byte."""
    batches = (corpus.batch("validation", 0, i, args.batch, args.seq) for i in range(VALIDATION_BATCHES))
    return sum(model(*(t.to(args.device) for t in batch)).item() for batch in batches) / VALIDATION_BATCHES


@torch.no_grad()
def generate(model: Llama, prompt: bytes, length: int, seed: int, temperature: float = 0.8) -> bytes:
    """``prompt`` and ``length`` sampled bytes; the model sees as many of the last ones as it has positions for."""
    device, window = model.lm_head.weight.device, model.cos.shape[0]
    generator = torch.Generator().manual_seed(seed)
    text = list(prompt)
    for _ in range(length):
        seen = text[-window:]
        padded = torch.tensor([seen + [0] * (window - len(seen))], device=device)
        scores = model.logits(padded)[0, len(seen) - 1].float().cpu()
        text.append(int(torch.multinomial(torch.softmax(scores / temperature, 0), 1, generator=generator)))
    return bytes(text)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", default="ternary", choices=("ternary", "2", "3", "4", "8"))
    parser.add_argument("--size", choices=PRESETS, default="tiny")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help='through torch.compile(backend="quartet")')
    parser.add_argument("--prompt", default="def ")
    parser.add_argument("--length", type=int, default=200, help="bytes to generate")
    parser.add_argument("--text", type=as_path, help="train on this file instead of the standard library's sources")
    parser.add_argument("--out", type=as_path, default=Path("direct-ternary.pt"), help=".safetensors or .pt")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> list[float]:
    args = parse(argv)
    check_folder(args.out.parent, "--out")
    if args.out.suffix == ".safetensors":
        require("safetensors")
    model, optimizer = build(args)
    corpus = read_corpus(args.text)
    losses = train(model, optimizer, corpus, args)
    print(f"validation loss {validate(model, corpus, args):.3f} nats a byte")
    text = generate(model, args.prompt.encode(), args.length, args.seed)
    print(text.decode(errors="replace"))

    found = direct.weight_bytes(model)
    direct.export(model, args.out)
    again = direct.load(Llama(PRESETS[args.size], args.seq).to(args.device), args.out)
    same = generate(again, args.prompt.encode(), args.length, args.seed) == text
    print(f"{found['low_bit_parameters']} weights in {found['low_bit_bytes']} bytes, "
          f"{found['bytes_per_parameter']:.3f} each; {args.out} generates {'the same' if same else 'ANOTHER'} text")
    return losses


if __name__ == "__main__":
    main()
