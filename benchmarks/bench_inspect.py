"""What the inspector takes of a training step: steps that are recorded, steps that are not, and checks for NaN.

    python benchmarks/bench_inspect.py --dim 4096 --layers 8 --tokens 16384
    python benchmarks/bench_inspect.py --dim 128 --layers 1 --tokens 256 --seq 64 --uncompiled

``--uncompiled`` runs the graphs as they are, without generated code. On a CPU it is the process's time that counts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from llama import Llama, LlamaConfig  # noqa: E402

import quartet  # noqa: E402
from quartet.backend import compile_graph  # noqa: E402
from quartet.inspect import Inspector  # noqa: E402
from quartet.options import Options  # noqa: E402
from quartet.runtime.capture import Capture  # noqa: E402

EVERY = 10
CASES = {"off": {}, "inspect": {"inspect": Inspector(EVERY)},
         "inspect, what_if": {"inspect": Inspector(EVERY, ["fp8", "mxfp8"])}, "check": {"check": "finite"}}


def compiled_by(model: torch.nn.Module, options: dict[str, object], uncompiled: bool) -> torch.nn.Module:
    if not uncompiled:
        return torch.compile(model, backend="quartet", options=options)
    parsed = Options.parse(None, options)
    return torch.compile(model, backend=lambda gm, inputs: compile_graph(
        gm, inputs, parsed, inner_compile=Capture(), say=lambda *_: None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("dim", 4096), ("layers", 8), ("tokens", 16384), ("seq", 2048), ("steps", 31)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--policy", default="quartet")
    parser.add_argument("--uncompiled", action="store_true")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    now = time.perf_counter if device == "cuda" else time.process_time
    print(f"{args} on {torch.cuda.get_device_name() if device == 'cuda' else device}, torch {torch.__version__}")
    print("| option | ms a step | ms where it is recorded |\n|---|---|---|")
    for name, options in CASES.items():
        torch.compiler.reset()
        torch.manual_seed(0)
        config = LlamaConfig(dim=args.dim, layers=args.layers, heads=args.dim // 128, ffn=3 * args.dim)
        model = Llama(config, args.seq).to(device, torch.bfloat16)
        compiled = compiled_by(model, {"policy": quartet.Policy(args.policy), **options}, args.uncompiled)
        optimizer = torch.optim.SGD(model.parameters(), 1e-4)
        tokens = torch.randint(256, (max(args.tokens // args.seq, 1), args.seq), device=device)
        times: list[float] = []
        for _ in range(args.steps):
            start = now()
            compiled(tokens, tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(1e3 * (now() - start))
        recorded = [ms for step, ms in enumerate(times) if step % EVERY == 0 and step > 0]
        others = [ms for step, ms in enumerate(times) if step % EVERY and step > 3]
        shown = f"{statistics.median(recorded):.1f}" if "inspect" in options else ""
        print(f"| {name} | {statistics.median(others):.1f} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
