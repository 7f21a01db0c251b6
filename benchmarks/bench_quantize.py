"""The quantise kernels against a copy: the bytes that each has to move over its time, as a share of the copy's rate.

    python benchmarks/bench_quantize.py
    python benchmarks/bench_quantize.py --sizes 16384x4096 --kernels "rows packed fold,fold" --repeat 50

Every kernel reads each input and writes each output once in that count, whatever it does; what it was not asked to
return does not count. ``packed`` rows are those of the default recipe's forward; ``quest`` has the Gaussian clip by the
root mean square and the nearest power of two, with its mask and without signs.
``folded`` are the ops of a step, with E4M3 operands as their results, by each of their providers.
Codes of one byte stand twice: ``by triton``, and ``Inductor``, what it generates from the reference of a quantiser,
alone, with no neighbour to fuse with; ``columns`` are the rows of the transpose, ``both`` is one read. A size is
``rows x columns`` of a bf16 tensor.
The kernels of a size and the copy of its tensor take turns in one process; inputs are random and rotate, and nothing of
them is in the L2 cache when a call starts.
``slots`` are the instructions that the GPU could have started per element in the time, at its highest clock: a kernel
that needs nearly as many is limited by them and not by the memory. ``<`` marks a share below its goal. A kernel that
fails says why, and the others go on. A run continues the file it finds at ``--out``.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import gpu_common as common
import torch
from gpu_common import say
from torch import Tensor

from quartet.lowering.ir.op import REFERENCE, Op, Provider
from quartet.runtime.devices import Target

SIZES = ("16384x1024", "16384x4096", "16384x8192", "16384x14336")
COPY = "copy"
ROW_GOAL, COLUMN_GOAL = 0.85, 0.75
BUFFERS = 3
MXFP8, FP8_BLOCK = "e4m3/32 e8m0 ceil nearest", "e4m3/128 fp32 amax_pow2 nearest"
BYTES = {  # quantiser, whether of the transpose, goal
    "mxfp8 rows": (MXFP8, False, 0.80),
    "mxfp8 columns": (MXFP8, True, 0.80),
    "int8 rows": ("int8/row fp32 amax nearest", False, 0.85),
    "fp8 rows": ("e4m3/row fp32 amax_pow2 nearest", False, 0.85),
    "fp8 1x128 rows": (FP8_BLOCK, False, 0.88),
    "fp8 1x128 columns": (FP8_BLOCK, True, 0.88),
    "fp8 128x128 tiles": ("e4m3/128x128 fp32 amax_pow2 nearest", False, 0.88),
}
BYTES_BOTH = {"mxfp8 both": MXFP8, "fp8 1x128 both": FP8_BLOCK}
BOTH_GOAL = 0.70
LANES = 128  # of one multiprocessor: four schedulers, each starting one instruction of 32 threads a cycle


@dataclass(frozen=True)
class Kernel:
    """Something to time on one buffer: ``call`` takes its inputs and returns its outputs."""

    goal: float | None
    inputs: Callable[[Tensor], tuple[Tensor, ...]]
    call: Callable[..., Any]


class Run:
    """Calls of a kernel on rotating inputs; a ``gpu_common.Case``."""

    def __init__(self, kernel: Kernel, buffers: Sequence[Tensor]) -> None:
        self.kernel = kernel
        self.inputs = [kernel.inputs(x) for x in buffers]
        self.outputs: Any = None

    def reset(self, i: int) -> None:
        self.outputs = None

    def run(self, i: int) -> None:
        self.outputs = self.kernel.call(*self.inputs[i % len(self.inputs)])

    def bytes(self) -> int:
        """Size of the inputs and outputs of one call; makes that call."""
        self.run(0)
        return nbytes(self.inputs[0]) + nbytes(self.outputs)


def nbytes(tensors: Tensor | Sequence[Tensor]) -> int:
    return sum(t.nbytes for t in ([tensors] if isinstance(tensors, Tensor) else tensors))


def default_forward() -> Any:
    """The GEMM that users run in forward."""
    from quartet.recipes import recipes

    return recipes()["quartet"].fprop


def by_inductor(spec: str, transposed: bool) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Codes and scales by what Inductor generates for the semantic op of a quantiser."""
    from quartet.lowering.targets import inductor

    inductor.register()
    common.allow_many_graphs()

    def quantize(x: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.quartet.quantize(x.t() if transposed else x, spec, None, 0)[:2]

    return torch.compile(quantize, dynamic=False, fullgraph=True)


def by_triton(spec: str, transposed: bool) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Codes and scales by the kernel of one-byte codes, whether or not it is what graphs call."""
    return lambda x: torch.ops.quartet.cuda_quantize_bytes.triton(x.t() if transposed else x, spec)


def by_providers(name: str, op: Op, inputs: Callable[[Tensor], tuple[Tensor, ...]],
                 *arguments: Any) -> dict[str, Kernel]:
    """An op by each of its providers but the reference; one that is not here fails, and says why."""

    def run(provider: Provider, *tensors: Tensor) -> Any:
        declined = provider.declines(Target.of(tensors[0].device))
        if declined is not None:
            raise RuntimeError(declined)
        return provider.run(*tensors, *arguments)

    return {f"{name} by {provider.name}": Kernel(COLUMN_GOAL, inputs, partial(run, provider))
            for provider in op.providers if provider.name != REFERENCE}


def kernels(device: torch.device, seed: int) -> dict[str, Kernel]:
    """What is measured, by name; the first is the copy."""
    from quartet.kernels.reference import random_signs
    from quartet.kernels.reference.formats.nvfp4 import tensor_scales
    from quartet.kernels.spec import QuantSpec
    from quartet.kernels.triton.quantize import ops, rotations
    from quartet.lowering.ir.ops import fused

    bits = torch.tensor(seed, device=device)
    signs = random_signs(bits, 3, 32)
    fprop = default_forward()
    fixed = torch.tensor(fprop.rotation.signs, dtype=torch.float32, device=device)
    default = ops.Chain(fprop.a.spec, fprop.rotation.n, fixed)
    quest = ops.Chain(QuantSpec(rule="quest", sigma="rms", power="nearest", mask=True), 32)
    stochastic = ops.Chain(QuantSpec(rule="headroom", rounding="stochastic"), 32, signs, bits, 7)
    nearest = ops.Chain(QuantSpec(rule="headroom"), 32, signs)
    chain = 32, signs, str(stochastic.spec), bits, 7, None

    def nvfp4(text: str, rotation: int = 0) -> ops.Chain:
        """Under a tensor whose largest magnitude is 5, as that of these inputs nearly is."""
        spec, amax = QuantSpec.parse(f"e2m1/{text}"), torch.full((1, 1), 5.0, device=device)
        return ops.Chain(spec, rotation, random_signs(bits, 3, rotation) if rotation else None, bits, 7,
                         tensor_scales(amax, spec)[0])

    plain, turned = nvfp4("16 e4m3 amax stochastic"), nvfp4("16 e4m3 amax stochastic", 16)
    def alone(x: Tensor) -> tuple[Tensor, ...]:
        return (x,)

    def packed(x: Tensor) -> tuple[Tensor, ...]:
        return ops.quantize(x, default, packed=True, folded=False)[:2]

    def masked(x: Tensor) -> tuple[Tensor, ...]:
        return x, ops.quantize(x, quest, packed=True, folded=False)[2]

    def quantize(chain: Any, packed: bool, folded: bool) -> Callable[[Tensor], Any]:
        return lambda x: ops.quantize(x, chain, packed=packed, folded=folded)

    def unrotate(x: Tensor, mask: Tensor | None = None) -> Tensor:
        return rotations.mask_rotate(x, mask, rotation=32, signs=fixed if mask is None else None, gain=4 / 3,
                                     cols=x.shape[1], dtype=x.dtype)

    return {
        COPY: Kernel(None, alone, torch.clone),
        "rows packed fold": Kernel(ROW_GOAL, alone, quantize(default, True, True)),
        "rows packed": Kernel(ROW_GOAL, alone, quantize(default, True, False)),
        "rows quest packed fold": Kernel(ROW_GOAL, alone, quantize(quest, True, True)),
        "rows quest packed": Kernel(ROW_GOAL, alone, quantize(quest, True, False)),
        "rows SR fold": Kernel(ROW_GOAL, alone, quantize(stochastic, False, True)),
        "both SR": Kernel(COLUMN_GOAL, alone, lambda x: ops.quantize_both(x, stochastic, stochastic)),
        "both nearest": Kernel(COLUMN_GOAL, alone, lambda x: ops.quantize_both(x, nearest, nearest)),
        "columns SR": Kernel(COLUMN_GOAL, alone, lambda x: quantize(stochastic, True, False)(x.t())),
        "requantize SR": Kernel(COLUMN_GOAL, packed, lambda c, s: ops.requantize(c, s, default.spec, stochastic)),
        **by_providers("both SR folded", fused.cuda_quantize_both, alone, *chain, *chain),
        **by_providers("requantize SR folded", fused.cuda_requantize, packed, str(default.spec), *chain, False, True),
        "fold": Kernel(ROW_GOAL, packed, lambda c, s: ops.fold(c, s, default.spec)),
        "unrotate": Kernel(ROW_GOAL, alone, unrotate),
        "mask unrotate": Kernel(ROW_GOAL, masked, unrotate),
        "nvfp4 rows": Kernel(ROW_GOAL, alone, quantize(nvfp4("16 e4m3 amax nearest"), True, False)),
        "nvfp4 rows SR": Kernel(ROW_GOAL, alone, quantize(plain, True, False)),
        "nvfp4 rows 4/6": Kernel(ROW_GOAL, alone, quantize(nvfp4("16 e4m3 four_six nearest"), True, False)),
        "nvfp4 rows eden": Kernel(ROW_GOAL, alone, quantize(nvfp4("16 e4m3 eden stochastic"), True, False)),
        "nvfp4 tiles": Kernel(ROW_GOAL, alone, quantize(nvfp4("16x16 e4m3 amax nearest"), True, False)),
        "nvfp4 both SR": Kernel(COLUMN_GOAL, alone, lambda x: ops.quantize_both(x, plain, turned)),
        "nvfp4 columns SR": Kernel(COLUMN_GOAL, alone, lambda x: quantize(turned, True, False)(x.t())),
        "rotated amax": Kernel(ROW_GOAL, alone, lambda x: rotations.rotated_amax(x, 16, turned.signs)),
        "rotated amax of columns": Kernel(ROW_GOAL, alone, lambda x: rotations.rotated_amax(x.t(), 16, turned.signs)),
        "rotate 128": Kernel(ROW_GOAL, alone, lambda x: rotations.rotate(x, 128, None)),
        "Inductor fp8 tensor": Kernel(ROW_GOAL, alone, by_inductor("e4m3/tensor fp32 amax nearest", False)),
        **{f"{name} by triton": Kernel(goal, alone, by_triton(spec, transposed))
           for name, (spec, transposed, goal) in BYTES.items()},
        **{f"{name} by triton": Kernel(BOTH_GOAL, alone, partial(torch.ops.quartet.cuda_quantize_bytes_both.triton,
                                                                 spec=spec, t_spec=spec))
           for name, spec in BYTES_BOTH.items()},
        **{f"Inductor {name}": Kernel(goal, alone, by_inductor(spec, transposed))
           for name, (spec, transposed, goal) in BYTES.items()},
    }


def issue_rate(device: torch.device) -> float | None:
    """Instructions of one thread that the whole GPU can start in a second, or None where its clock is not told."""
    properties = torch.cuda.get_device_properties(device)
    kilohertz = getattr(properties, "clock_rate", None)
    return properties.multi_processor_count * LANES * kilohertz * 1e3 if kilohertz else None


def rates(columns: dict[str, dict[str, Any]], elements: int, issues: float | None) -> None:
    """Add to each kernel that has a time its TB/s, its share of the copy's, and its slots per element."""
    timed = [data for data in columns.values() if "ms" in data]
    for data in timed:
        data["tb_s"] = data["bytes"] / data["ms"] / 1e9
        data["slots"] = data["ms"] * 1e-3 * issues / elements if issues else None
    copy = columns.get(COPY, {}).get("tb_s")
    for data in timed:
        data["share"] = data["tb_s"] / copy if copy else None


def measure(size: str, measured: dict[str, Kernel], args: argparse.Namespace) -> dict[str, Any]:
    """All kernels on one size."""
    rows, cols = parse_size(size)
    torch.manual_seed(args.seed)
    buffers = [torch.randn(rows, cols, dtype=torch.bfloat16, device=args.device) for _ in range(BUFFERS)]
    cases: dict[str, common.Case] = {}
    columns: dict[str, dict[str, Any]] = {}
    for name, kernel in measured.items():
        try:
            run = Run(kernel, buffers)
            columns[name] = {"goal": kernel.goal, "bytes": run.bytes()}
            common.synchronize(args.device)
            cases[name] = run
        except Exception as error:
            columns[name] = common.failure(error)
            say(f"  {name:24} {columns[name]['failed']}")
    for name, times in common.Clock(args.device).interleaved(cases, args.repeat).items():
        columns[name] |= common.summary(times)
    rates(columns, rows * cols, issue_rate(args.device))
    return {"rows": rows, "cols": cols, "kernels": columns}


def details(columns: dict[str, dict[str, Any]], elements: int) -> str:
    """A table of one size."""
    rows = [["", "bytes/element", "µs", "TB/s", "share", "goal", "slots"]]
    for name, data in columns.items():
        if "ms" in data:
            rows.append([name, f"{data['bytes'] / elements:.2f}", f"{1e3 * data['ms']:.1f}", f"{data['tb_s']:.2f}",
                         share(data), "" if data["goal"] is None else f"{data['goal']:.2f}",
                         "" if data["slots"] is None else f"{data['slots']:.1f}"])
    return common.table(rows)


def share(data: dict[str, Any]) -> str:
    if "ms" not in data:
        return "failed" if data else ""
    if data["share"] is None:
        return ""
    return f"{'<' if data['goal'] is not None and data['share'] < data['goal'] else ''}{data['share']:.2f}"


def report(record: common.Record, names: Sequence[str]) -> None:
    """Print each kernel's share at every size that was measured."""
    results = record.results
    rows = [["share of a copy", *results]]
    rows += [[name, *(share(result["kernels"].get(name, {})) for result in results.values())] for name in names]
    say(common.table(rows))


def parse_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None or not int(match[1]) * int(match[2]) or int(match[2]) % 32:
        raise ValueError(f"size {text!r} is not ROWSxCOLUMNS with columns divisible by 32, for example {SIZES[1]}")
    return int(match[1]), int(match[2])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=common.names, default=list(SIZES), help=f"default {','.join(SIZES)}")
    parser.add_argument("--kernels", type=common.names, metavar="NAMES", help="default: all; the copy always is")
    parser.add_argument("--repeat", type=int, default=30, help="timed calls of each kernel (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    common.add_arguments(parser, "bench_quantize", "size")
    args = parser.parse_args(argv)
    try:
        for size in args.sizes:
            parse_size(size)
    except ValueError as error:
        parser.error(str(error))
    if args.device.type != "cuda" or not torch.cuda.is_available():
        parser.error(f"this times Triton kernels and needs a CUDA device; --device is {args.device}, and "
                     f"torch {torch.__version__} sees {torch.cuda.device_count()} of them")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    deadline = common.Deadline(args.time_limit)
    every = kernels(args.device, args.seed)
    unknown = [name for name in args.kernels or () if name not in every]
    if unknown:
        raise SystemExit(f"there is no kernel {unknown[0]!r}; possible: {', '.join(every)}")
    chosen = {name: kernel for name, kernel in every.items() if name in (COPY, *(args.kernels or every))}
    settings = common.environment(args.device) | {"repeat": args.repeat, "seed": args.seed,
                                                  "forward": str(default_forward().a.spec)}
    say(common.describe(settings))
    record = common.Record(args.out, "bench_quantize", settings, args.fresh)
    for size in args.sizes:
        earlier = record.results.get(size, {}).get("kernels", {})
        if all("ms" in earlier.get(name, {}) for name in chosen):
            continue
        if deadline.passed:
            say("time limit reached")
            break
        say(size)
        result = measure(size, chosen, args)
        record.put(size, result)
        common.release(args.device)
        say(details(result["kernels"], result["rows"] * result["cols"]))
    report(record, list(every))


if __name__ == "__main__":
    main()
