"""Who should quantise what a norm or an activation makes: our kernel after it, or Inductor fused with it?

    python benchmarks/bench_fusion.py

The producers are an RMSNorm and SiLU(a)·b of bf16 tensors; the quantiser is the forward's of ``quartet``: rotate,
scale, round and pack. ``apart`` runs the producer as Inductor compiles it and then the Triton kernel; ``fused``
compiles the producer and the reference quantiser as one function. Both give the same codes up to the producer's own
rounding: the table says how many differ. ``bytes`` is what each has to move at least. Random inputs, nothing in the L2
cache, medians of interleaved calls.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import gpu_common as common
import torch
import torch.nn.functional as F
from gpu_common import say
from torch import Tensor

from quartet.kernels import reference
from quartet.recipes import recipes

SIZES = ((16384, 2048), (16384, 4096), (16384, 14336))
FORWARD = recipes()["quartet"].fprop
SPEC, ROTATION = FORWARD.a.spec, FORWARD.rotation
BUFFERS = 3
Results = tuple[Tensor, ...]


class Call:
    """A function to time; a ``gpu_common.Case``."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function, self.result = function, None

    def reset(self, i: int) -> None:
        self.result = None

    def run(self, i: int) -> None:
        self.result = self.function()


def rms_norm(x: Tensor, _: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[1],))


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    return F.silu(a) * b


PRODUCERS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {"RMSNorm": (rms_norm, 1), "SwiGLU": (swiglu, 2)}


def apart(producer: Callable[[Tensor, Tensor], Tensor], signs: Tensor) -> Callable[[Tensor, Tensor], Results]:
    from quartet.kernels.triton.quantize import ops

    compiled, chain = torch.compile(producer, dynamic=False), ops.Chain(SPEC, ROTATION.n, signs)
    return lambda a, b: ops.quantize(compiled(a, b), chain, packed=True, folded=False)[:3]


def fused(producer: Callable[[Tensor, Tensor], Tensor], signs: Tensor) -> Callable[[Tensor, Tensor], Results]:
    def function(a: Tensor, b: Tensor) -> Results:
        return reference.quantize(reference.hadamard(producer(a, b), ROTATION.n, signs), SPEC)

    return torch.compile(function, dynamic=False)


def measure(rows: int, cols: int, args: argparse.Namespace) -> dict[str, Any]:
    buffers = [torch.randn(2, rows, cols, device=args.device).bfloat16() for _ in range(BUFFERS)]
    signs = torch.tensor(ROTATION.signs, dtype=torch.float32, device=args.device)
    results: dict[str, Any] = {}
    clock = common.Clock(args.device)
    for name, (producer, inputs) in PRODUCERS.items():
        ways = {"apart": apart(producer, signs), "fused": fused(producer, signs)}
        made = {way: call(*buffers[0]) for way, call in ways.items()}
        differ = (made["apart"][0] != made["fused"][0]).float().mean().item()
        cases = {way: Call(lambda call=call: call(*buffers[1])) for way, call in ways.items()}
        times = {way: common.summary(t) for way, t in clock.interleaved(cases, args.repeat).items()}
        out = sum(t.nbytes for t in made["apart"])
        moved = {"fused": 2 * rows * cols * inputs + out, "apart": 2 * rows * cols * (inputs + 2) + out}
        results[name] = {way: times[way] | {"bytes": moved[way]} for way in ways} | {"differ": differ}
    return results


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=20)
    common.add_arguments(parser, "bench_fusion", "size")
    args = parser.parse_args(argv)
    if args.device.type != "cuda":
        parser.error(f"this measures a GPU; --device is {args.device}")
    torch.manual_seed(0)
    deadline = common.Deadline(args.time_limit)
    settings = common.environment(args.device) | {"repeat": args.repeat, "quantiser": str(SPEC)}
    record = common.Record(args.out, "bench_fusion", settings, args.fresh)
    rows = [["", "apart µs", "TB/s", "fused µs", "TB/s", "fused/apart", "codes that differ"]]
    for size in SIZES:
        name = "x".join(map(str, size))
        if name not in record.results and not deadline.passed:
            record.put(name, measure(*size, args))
            common.release(args.device)
        for producer, data in record.results.get(name, {}).items():
            cells = [text for way in ("apart", "fused") for text in (
                f"{1e3 * data[way]['ms']:.0f}", f"{data[way]['bytes'] / data[way]['ms'] / 1e9:.2f}")]
            rows.append([f"{producer} {name}", *cells, f"{data['fused']['ms'] / data['apart']['ms']:.2f}",
                         f"{data['differ']:.1e}"])
    say(common.table(rows))


if __name__ == "__main__":
    main()
