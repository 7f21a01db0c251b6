"""Who should quantise what a norm or an activation makes: our kernel after it, or Inductor fused with it?

    python benchmarks/bench_fusion.py
    python benchmarks/bench_fusion.py --quantizers "int8/row fp32 amax nearest,e4m3/128 fp32 amax_pow2 nearest"

The producers are an RMSNorm and SiLU(a)·b of bf16 tensors; the quantiser is by default the forward's of ``quartet``:
rotate, scale, round and pack; others are to codes of one byte, without a rotation. ``apart`` runs the producer as
Inductor compiles it and then the Triton kernel; ``fused`` compiles the producer and the reference quantiser as one
function. Both give the same codes up to the producer's own rounding: the table says how many differ. ``bytes`` is what
each has to move at least. Random inputs, nothing in the L2 cache, medians of interleaved calls.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import gpu_common as common
import torch
import torch.nn.functional as F
from gpu_common import say
from torch import Tensor

from quartet.kernels import reference
from quartet.kernels.spec import QuantSpec
from quartet.recipes import recipes

SIZES = ((16384, 2048), (16384, 4096), (16384, 14336))
FORWARD = recipes()["quartet"].fprop
DEFAULT, ROTATION = FORWARD.a.spec, FORWARD.rotation
BUFFERS = 3
Results = tuple[Tensor, ...]
Producer = Callable[[Tensor, Tensor], Tensor]


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


PRODUCERS: dict[str, tuple[Producer, int]] = {"RMSNorm": (rms_norm, 1), "SwiGLU": (swiglu, 2)}


def apart(producer: Producer, spec: QuantSpec, signs: Tensor | None) -> Callable[[Tensor, Tensor], Results]:
    from quartet.kernels.triton.quantize import ops

    compiled = torch.compile(producer, dynamic=False)
    if signs is None:
        return lambda a, b: torch.ops.quartet.cuda_quantize_bytes.triton(compiled(a, b), str(spec))
    chain = ops.Chain(spec, len(signs), signs)
    return lambda a, b: ops.quantize(compiled(a, b), chain, packed=True, folded=False)[:3]


def fused(producer: Producer, spec: QuantSpec, signs: Tensor | None) -> Callable[[Tensor, Tensor], Results]:
    if signs is None:
        from quartet.lowering.targets import inductor

        inductor.register()

    def function(a: Tensor, b: Tensor) -> Results:
        x = producer(a, b)
        if signs is None:
            return torch.ops.quartet.quantize(x, str(spec), None, 0)[:2]
        return reference.quantize(reference.hadamard(x, len(signs), signs), spec)

    return torch.compile(function, dynamic=False)


def measure(rows: int, cols: int, spec: QuantSpec, args: argparse.Namespace) -> dict[str, Any]:
    buffers = [torch.randn(2, rows, cols, device=args.device).bfloat16() for _ in range(BUFFERS)]
    rotated = spec == DEFAULT
    signs = torch.tensor(ROTATION.signs, dtype=torch.float32, device=args.device) if rotated else None
    results: dict[str, Any] = {}
    clock = common.Clock(args.device)
    for name, (producer, inputs) in PRODUCERS.items():
        ways = {"apart": apart(producer, spec, signs), "fused": fused(producer, spec, signs)}
        made = {way: call(*buffers[0]) for way, call in ways.items()}
        differ = (made["apart"][0].view(torch.uint8) != made["fused"][0].view(torch.uint8)).float().mean().item()
        cases = {way: Call(lambda call=call: call(*buffers[1])) for way, call in ways.items()}
        times = {way: common.summary(t) for way, t in clock.interleaved(cases, args.repeat).items()}
        out = sum(t.nbytes for t in made["apart"])
        moved = {"fused": 2 * rows * cols * inputs + out, "apart": 2 * rows * cols * (inputs + 2) + out}
        results[name] = {way: times[way] | {"bytes": moved[way]} for way in ways} | {"differ": differ}
    return results


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--quantizers", type=common.names, default=[str(DEFAULT)], metavar="SPECS",
                        help="default: the forward's of quartet")
    common.add_arguments(parser, "bench_fusion", "size")
    args = parser.parse_args(argv)
    if args.device.type != "cuda":
        parser.error(f"this measures a GPU; --device is {args.device}")
    torch.manual_seed(0)
    deadline = common.Deadline(args.time_limit)
    settings = common.environment(args.device) | {"repeat": args.repeat}
    record = common.Record(args.out, "bench_fusion", settings, args.fresh)
    rows = [["", "apart µs", "TB/s", "fused µs", "TB/s", "fused/apart", "codes that differ"]]
    for spec, size in itertools.product(map(QuantSpec.parse, args.quantizers), SIZES):
        name = f"{'x'.join(map(str, size))} {spec}"
        if name not in record.results and not deadline.passed:
            record.put(name, measure(*size, spec, args))
            common.release(args.device)
        for producer, data in record.results.get(name, {}).items():
            cells = [text for way in ("apart", "fused") for text in (
                f"{1e3 * data[way]['ms']:.0f}", f"{data[way]['bytes'] / data[way]['ms'] / 1e9:.2f}")]
            rows.append([f"{producer} {name}", *cells, f"{data['fused']['ms'] / data['apart']['ms']:.2f}",
                         f"{data['differ']:.1e}"])
    say(common.table(rows))


if __name__ == "__main__":
    main()
