"""Seconds of the processor that our passes take of a compilation, on any machine.

Kernels are chosen for a GPU that need not be there, and the compilation ends where Inductor would generate code.

    python benchmarks/compile_time.py --layers 16,32 --policies fp8,quartet
    python benchmarks/compile_time.py --layers 4 --policies quartet --profile quartet.prof

The model is ``examples/llama.py`` with the widths of Llama 3.2 1B, BF16, 4 × 2048 tokens; nothing of it is computed.
``whole`` is all that the backend does until then, AOTAutograd's tracing and the final division among it; ``bf16`` is
Inductor's backend. ``divisions`` are the trial ones by which is chosen what is kept, within ``begin`` and ``save``.
"""

from __future__ import annotations

import argparse
import cProfile
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
from gpu_common import BASELINE, names, table
from llama import Llama, LlamaConfig
from torch._inductor.compile_fx import compile_fx

from quartet.backend import compile_graph
from quartet.options import Options
from quartet.passes import pipeline
from quartet.passes.compilation import Observer
from quartet.passes.residuals.trial import Trial
from quartet.runtime.devices import Target

BATCH, LENGTH = 4, 2048


class Generated(Exception):
    """The compilation has come to Inductor's code generation."""


class Clock(Observer):
    """Adds up what each pass takes."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def before(self, index: int, name: str, gm: torch.fx.GraphModule) -> None:
        self._began = time.process_time()

    def after(self, index: int, name: str, gm: torch.fx.GraphModule, seconds: float) -> None:
        self.seconds[name] += time.process_time() - self._began

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose calls are added up under a name."""
        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += time.process_time() - began
        return run


def measure(policy: str, layers: int, target: str, profile: cProfile.Profile | None = None) -> Counter[str]:
    """What the parts of one compilation take, ``whole`` among them."""
    torch._dynamo.reset()
    with torch.device("meta"):
        model = Llama(LlamaConfig(dim=2048, layers=layers, heads=32, ffn=8192, vocabulary=32000), LENGTH).bfloat16()
    model = model.to_empty(device="cpu")  # not written, so it takes no memory
    tokens, clock = torch.zeros(BATCH, LENGTH, dtype=torch.long), Clock()

    def generate(*args: Any, **kwargs: Any) -> Any:
        raise Generated

    if policy == BASELINE:
        def compile(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
            return compile_fx(gm, inputs, inner_compile=generate)
    else:
        options = replace(Options.parse(options={"policy": policy}, passes=pipeline.OPTIONAL),
                          target=Target.named(target))

        def compile(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
            return compile_graph(gm, inputs, options, inner_compile=generate, observers=(clock,))

    def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        with profile or nullcontext():
            return clock.timed("whole", compile)(gm, inputs)

    divided, begin = Trial.divided, pipeline.begin
    Trial.divided, pipeline.begin = clock.timed("divisions", divided), clock.timed("begin", begin)
    try:
        torch.compile(model, backend=backend, fullgraph=True)(tokens, tokens)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        if not isinstance(error.inner_exception, Generated):
            raise
    finally:
        Trial.divided, pipeline.begin = divided, begin
    return clock.seconds


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=lambda text: [int(n) for n in names(text)], default=[16, 32])
    parser.add_argument("--policies", type=names, default=[BASELINE, "fp8", "quartet", "auto"])
    parser.add_argument("--target", default="h200", help="the GPU to compile for (%(default)s)")
    parser.add_argument("--profile", type=Path, help="write what cProfile sees of the last compilation")
    args = parser.parse_args(argv)
    columns: dict[tuple[str, int], Counter[str]] = {}
    measure(args.policies[0], 1, args.target)  # what is imported at first use
    for layers in args.layers:
        for policy in args.policies:
            columns[policy, layers] = measure(policy, layers, args.target)
            print(f"{policy}, {layers} layers: {columns[policy, layers]['whole']:.1f} s", flush=True)
    if args.profile:
        seen = cProfile.Profile(time.process_time)
        measure(args.policies[-1], args.layers[-1], args.target, seen)
        seen.dump_stats(args.profile)
    parts = list(dict.fromkeys(name for column in columns.values() for name, took in column.items() if took >= 0.05))
    print(table([["seconds", *(f"{policy}, {layers}" for policy, layers in columns)],
                 *([part, *(f"{column[part]:.1f}" for column in columns.values())] for part in parts)]))


if __name__ == "__main__":
    main()
