"""Forward and backward of one linear layer, and of a SwiGLU MLP, in BF16 against FP8 and FP4.

    python benchmarks/bench_linear.py
    python benchmarks/bench_linear.py --shapes first8 --columns bf16,torchao,fp8,quartet --time-limit 420
    python benchmarks/bench_linear.py --profile quartet --shapes 15872x4096x12288
    python benchmarks/plot.py bench-out/bench_linear.json

A case is ``tokens x in x out`` of one bias-free bf16 linear layer, or ``mlp-tokens x dim x hidden``. All columns of a
case start from the same weights and are timed in one process, taking turns; inputs (which require their gradient) and
output gradients are random and rotate among several buffers; compilation is not timed. The table gives each column's
speed as a multiple of BF16's; ``*`` marks times shorter than the host takes to launch the step. The error of a column
is its distance from BF16's output and gradients: 0 says that it left the products in BF16. A column that fails says
why, and the others go on. A run continues the file it finds at ``--out``.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import gpu_common as common
import torch
import torch.nn as nn
from gpu_common import say
from llama import FeedForward, LlamaConfig
from torch import Tensor

FIRST8 = (
    "15872x4096x12288", "15872x4096x4096", "15872x4096x16384", "15872x16384x4096",
    "8192x4096x6144", "8192x4096x4096", "8192x4096x14336", "8192x14336x4096",
)
GROUPS = {
    "first8": FIRST8,
    "small": ("2048x1024x1024", "2048x2048x2048", "4096x2048x8192"),
    "odd": ("15871x4096x12288", "8192x4092x14332"),
    "mlp": ("mlp-15872x4096x12288", "mlp-8192x4096x14336", "mlp-2048x1024x4096"),
}
ROTATED_BYTES = 256 << 20
MOST_BUFFERS = 8


@dataclass(frozen=True)
class Shape:
    """One case: a linear layer of ``fan_in`` to ``fan_out`` features, or an MLP from ``fan_in`` over ``fan_out``."""

    mlp: bool
    tokens: int
    fan_in: int
    fan_out: int

    @classmethod
    def parse(cls, name: str) -> Shape:
        match = re.fullmatch(r"(mlp-)?(\d+)x(\d+)x(\d+)", name)
        if match is None:
            raise ValueError(f"shape {name!r} is neither a group ({', '.join(GROUPS)}) nor TOKENSxINxOUT nor "
                             "mlp-TOKENSxDIMxHIDDEN, for example 8192x4096x4096")
        return cls(bool(match[1]), int(match[2]), int(match[3]), int(match[4]))

    @property
    def flops(self) -> int:
        """Multiplications and additions of the matrix products, forward and backward."""
        return (3 if self.mlp else 1) * 6 * self.tokens * self.fan_in * self.fan_out

    @property
    def outputs(self) -> int:
        return self.fan_in if self.mlp else self.fan_out

    def model(self) -> nn.Module:
        if self.mlp:
            return FeedForward(LlamaConfig(dim=self.fan_in, layers=1, heads=1, ffn=self.fan_out))
        return OneLinear(self.fan_in, self.fan_out)


class OneLinear(nn.Module):
    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(fan_in, fan_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Buffers:
    """Random inputs and output gradients of a case, as many of each as exceed a cache."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        size = 2 * shape.tokens * (shape.fan_in + shape.outputs)
        count = max(2, min(MOST_BUFFERS, -(-ROTATED_BYTES // size)))
        kind: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
        self.inputs = [torch.randn(shape.tokens, shape.fan_in, requires_grad=True, **kind) for _ in range(count)]
        self.gradients = [torch.randn(shape.tokens, shape.outputs, **kind) for _ in range(count)]

    def __len__(self) -> int:
        return len(self.inputs)


class Step:
    """Forward and backward of one column; a ``gpu_common.Case``."""

    def __init__(self, column: str, model: nn.Module, buffers: Buffers, args: argparse.Namespace) -> None:
        self.model = common.prepare(column, model)
        self.buffers = buffers
        self.call: Callable[[Tensor], Tensor] = common.compiled(column, self.model, args.compiler,
                                                                cuda_graphs=args.cuda_graphs)

    def reset(self, i: int) -> None:
        self.model.zero_grad()
        self.buffers.inputs[i % len(self.buffers)].grad = None

    def run(self, i: int) -> None:
        self.forward_backward(i)

    def forward_backward(self, i: int) -> Tensor:
        i %= len(self.buffers)
        y = self.call(self.buffers.inputs[i])
        y.backward(self.buffers.gradients[i])
        return y.detach()

    def results(self) -> dict[str, Tensor]:
        """Output, input gradient and one weight gradient on the first buffers; the first call compiles."""
        self.reset(0)
        y = self.forward_backward(0)
        weight = next(self.model.parameters())
        x = self.buffers.inputs[0]
        assert x.grad is not None and weight.grad is not None
        return {"y": y.clone(), "gx": x.grad.clone(), "gw": weight.grad.clone()}  # a CUDA graph writes y again


def errors(results: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative distance ‖a − b‖ / ‖b‖ of each result."""
    return {key: float((value.float() - exact[key].float()).norm() / exact[key].float().norm())
            for key, value in results.items()}


def build(column: str, model: nn.Module, buffers: Buffers, args: argparse.Namespace,
          exact: dict[str, Tensor]) -> tuple[Step, dict[str, Any]]:
    """A compiled step, how long that took and how far its results are from BF16's."""
    start = time.perf_counter()
    step = Step(column, copy.deepcopy(model), buffers, args)
    results = step.results()
    common.synchronize(args.device)
    seconds = time.perf_counter() - start
    if not exact:
        exact.update(results)
    return step, {"compile_s": seconds, "error": errors(results, exact)}


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """All columns of one case."""
    shape = Shape.parse(name)
    torch.manual_seed(args.seed)
    with torch.device(args.device):
        model = shape.model().bfloat16()
    buffers = Buffers(shape, args.device)
    steps: dict[str, common.Case] = {}
    columns: dict[str, dict[str, Any]] = {}
    exact: dict[str, Tensor] = {}
    for column in sorted(args.columns, key=lambda column: column != common.BASELINE):
        try:
            steps[column], columns[column] = build(column, model, buffers, args, exact)
            say(f"  {column:22} compiled in {columns[column]['compile_s']:5.1f} s, error "
                + common.describe({key: f"{value:.1e}" for key, value in columns[column]["error"].items()}))
        except Exception as error:
            columns[column] = common.failure(error)
            say(f"  {column:22} {columns[column]['failed']}")
    exact.clear()
    try:
        for column, times in common.Clock(args.device).interleaved(steps, args.repeat).items():
            columns[column] |= common.summary(times)
            columns[column]["tflops"] = shape.flops / columns[column]["ms"] / 1e9
    except Exception as error:  # whichever column it was, the times of none are complete
        columns = {column: common.failure(error) | columns[column] for column in columns}
    return {"mlp": shape.mlp, "tokens": shape.tokens, "in": shape.fan_in, "out": shape.fan_out, "flops": shape.flops,
            "columns": {column: columns[column] for column in args.columns}, "ratios": ratios(columns)}


def ratios(columns: dict[str, dict[str, Any]]) -> dict[str, float]:
    """BF16's time over each column's."""
    times = {column: data["ms"] for column, data in columns.items() if "ms" in data}
    return {column: times[common.BASELINE] / ms for column, ms in times.items()} if common.BASELINE in times else {}


def line(name: str, result: dict[str, Any], columns: Sequence[str]) -> list[str]:
    def cell(column: str) -> str:
        data = result["columns"].get(column, {})
        if "ms" not in data:
            return "failed" if data else ""
        return f"{result['ratios'].get(column, float('nan')):.2f}{'*' if data['host_ms'] > data['ms'] else ''}"

    baseline = result["columns"].get(common.BASELINE, {})
    return [name, f"{baseline['ms']:.3f}" if "ms" in baseline else "", *(cell(c) for c in columns)]


def report(record: common.Record, columns: Sequence[str]) -> None:
    """Print the table and note the geometric means over what was measured of the first eight."""
    rows = [["tokens x in x out", "bf16 ms", *columns]]
    rows += [line(name, result, columns) for name, result in record.results.items()]
    done = [record.results[name]["ratios"] for name in FIRST8 if name in record.results]
    means = {column: common.geometric_mean([r[column] for r in done]) for column in columns
             if done and all(column in r for r in done)}
    rows.append([f"geometric mean, {len(done)} of the first 8", "",
                 *(f"{means[c]:.3f}" if c in means else "" for c in columns)])
    record.save(geometric_mean={"over": len(done), "ratios": means})
    say(common.table(rows))


def profile(args: argparse.Namespace) -> None:
    """The kernels of one step of the asked column, for each shape."""
    for name in args.shapes:
        shape = Shape.parse(name)
        torch.manual_seed(args.seed)
        with torch.device(args.device):
            model = shape.model().bfloat16()
        step = Step(args.profile, model, Buffers(shape, args.device), args)
        for i in range(3):
            step.reset(i)
            step.run(i)
        say(f"{args.profile} {name}, one step")
        rows = common.top_kernels(step, args.device, 5)
        common.show_kernels(rows)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        path = args.out.with_name(f"{args.out.stem}-{args.profile}-{name}.json")
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        common.release(args.device)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="first8,mlp,small,odd",
                        help=f"comma-separated shapes and groups ({', '.join(GROUPS)}); default: %(default)s")
    parser.add_argument("--mlp", action="store_true", help="the MLPs only")
    parser.add_argument("--columns", type=common.names, default=list(common.COLUMNS), metavar="NAMES",
                        help=f"of {', '.join(common.COLUMNS)}, or any policy of ours; default: these")
    parser.add_argument("--repeat", type=int, default=24, help="timed steps of each column (default %(default)s)")
    parser.add_argument("--profile", metavar="COLUMN", help="instead of timing print where this column's time goes")
    parser.add_argument("--compiler", default="inductor", help="torch.compile backend of the peers")
    parser.add_argument("--cuda-graphs", action="store_true", help="through CUDA graphs, all columns")
    parser.add_argument("--seed", type=int, default=0)
    common.add_arguments(parser, "bench_linear", "case")
    args = parser.parse_args(argv)
    wanted = ["mlp"] if args.mlp else common.names(args.shapes)
    args.shapes = [shape for name in wanted for shape in GROUPS.get(name, (name,))]
    try:
        for name in args.shapes:
            Shape.parse(name)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    deadline = common.Deadline(args.time_limit)
    settings = common.environment(args.device) | {"repeat": args.repeat, "seed": args.seed, "compiler": args.compiler,
                                                  "cuda_graphs": args.cuda_graphs}
    say(common.describe(settings))
    if args.profile:
        profile(args)
        return
    record = common.Record(args.out, "bench_linear", settings, args.fresh)
    for name in args.shapes:
        earlier = record.results.get(name, {}).get("columns", {})
        if all("ms" in earlier.get(column, {}) for column in args.columns):
            continue
        if deadline.passed:
            say("time limit reached")
            break
        say(name)
        try:
            result = measure(name, args)
        except Exception as error:
            say(f"  {common.failure(error)['failed']}\n  ending here; the same command continues")
            break
        record.put(name, result)
        common.release(args.device)
        say("  " + common.describe({column: f"{ratio:.2f}" for column, ratio in result["ratios"].items()}))
    report(record, args.columns)


if __name__ == "__main__":
    main()
