"""Forward and backward of one linear layer, and of a SwiGLU MLP, in BF16 against FP8 and FP4.

    python benchmarks/bench_linear.py
    python benchmarks/bench_linear.py --shapes first8 --columns bf16,torchao,fp8,quartet --time-limit 420
    python benchmarks/bench_linear.py --in-a-loop --columns bf16,fp8,quartet,auto
    python benchmarks/bench_linear.py --profile quartet --shapes 15872x4096x12288
    python benchmarks/plot.py bench-out/bench_linear.json

A case is ``tokens x in x out`` of one bias-free bf16 linear layer, or ``mlp-tokens x dim x hidden``. All columns of a
case start from the same weights and are timed in one process, taking turns; inputs (which require their gradient) and
output gradients are random and rotate among several buffers; compilation is not timed. Each step starts behind a full
launch queue, so that the device's time is what counts; ``--in-a-loop`` times steps as a training loop makes them. The
table gives each column's speed as a multiple of BF16's; ``*`` marks times shorter than the host takes to launch the
step. The error of a column is its distance from BF16's output and gradients: 0 says that it left the products in BF16.
A column that fails says why, and the others go on. A run continues the file it finds at ``--out``.
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import gpu_common as common
import micro_batches
import torch
import torch.nn as nn
from gpu_common import say
from llama import FeedForward, LlamaConfig
from output import check_folder, write_json
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


class Layer(Protocol):
    """What is measured: a module from ``[tokens, fan_in]`` to ``[tokens, outputs]``."""

    @property
    def tokens(self) -> int: ...

    @property
    def fan_in(self) -> int: ...

    @property
    def outputs(self) -> int: ...

    @property
    def flops(self) -> int:
        """Multiplications and additions of the matrix products, forward and backward."""

    def describe(self) -> dict[str, Any]:
        """What the record says of it."""

    def model(self) -> nn.Module: ...

    def prepare(self, column: str, model: nn.Module) -> nn.Module:
        """The model as the column trains it."""

    def policy(self, column: str) -> Any:
        """What our backend takes for the column, or None for the recipe of that name."""


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
        return (3 if self.mlp else 1) * 6 * self.tokens * self.fan_in * self.fan_out

    @property
    def outputs(self) -> int:
        return self.fan_in if self.mlp else self.fan_out

    def model(self) -> nn.Module:
        if self.mlp:
            return FeedForward(LlamaConfig(dim=self.fan_in, layers=1, heads=1, ffn=self.fan_out))
        return OneLinear(self.fan_in, self.fan_out)

    def describe(self) -> dict[str, Any]:
        return {"mlp": self.mlp, "tokens": self.tokens, "in": self.fan_in, "out": self.fan_out}

    def prepare(self, column: str, model: nn.Module) -> nn.Module:
        return common.prepare(column, model)

    def policy(self, column: str) -> None:
        return None


class OneLinear(nn.Module):
    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(fan_in, fan_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Buffers:
    """Random inputs and output gradients of a case, as many of each as exceed a cache."""

    def __init__(self, layer: Layer, device: torch.device) -> None:
        size = 2 * layer.tokens * (layer.fan_in + layer.outputs)
        count = max(2, min(MOST_BUFFERS, -(-ROTATED_BYTES // size)))
        kind: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
        self.inputs = [torch.randn(layer.tokens, layer.fan_in, requires_grad=True, **kind) for _ in range(count)]
        self.gradients = [torch.randn(layer.tokens, layer.outputs, **kind) for _ in range(count)]

    def __len__(self) -> int:
        return len(self.inputs)


class Step:
    """Forward and backward of one column; a ``gpu_common.Case``."""

    def __init__(self, layer: Layer, column: str, model: nn.Module, buffers: Buffers, args: argparse.Namespace) -> None:
        self.model = layer.prepare(column, model)
        self.buffers = buffers
        self.call: Callable[[Tensor], Tensor] = common.compiled(column, self.model, args.compiler, layer.policy(column),
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


def build(layer: Layer, column: str, model: nn.Module, buffers: Buffers, args: argparse.Namespace,
          exact: dict[str, Tensor]) -> tuple[Step, dict[str, Any]]:
    """A compiled step, how long that took and how far its results are from BF16's."""
    start = time.perf_counter()
    step = Step(layer, column, copy.deepcopy(model), buffers, args)
    results = step.results()
    common.synchronize(args.device)
    seconds = time.perf_counter() - start
    if not exact:
        exact.update(results)
    return step, {"compile_s": seconds, "error": errors(results, exact)}


def made(layer: Layer, args: argparse.Namespace) -> nn.Module:
    """The same bf16 weights whenever they are made."""
    torch.manual_seed(args.seed)
    with torch.device(args.device):
        return layer.model().bfloat16()


def measure(layer: Layer, args: argparse.Namespace) -> dict[str, Any]:
    """All columns of one case."""
    model = made(layer, args)
    buffers = Buffers(layer, args.device)
    steps: dict[str, micro_batches.Step] = {}
    columns: dict[str, dict[str, Any]] = {}
    exact: dict[str, Tensor] = {}
    for column in sorted(args.columns, key=lambda column: column != common.BASELINE):
        try:
            steps[column], columns[column] = build(layer, column, model, buffers, args, exact)
            say(f"  {column:22} compiled in {columns[column]['compile_s']:5.1f} s, error "
                + common.describe({key: f"{value:.1e}" for key, value in columns[column]["error"].items()}))
        except Exception as error:
            columns[column] = common.failure(error)
            say(f"  {column:22} {columns[column]['failed']}")
    exact.clear()
    try:
        cases = micro_batches.cases(steps, args.micro_batches)
        times = common.Clock(args.device).interleaved(cases, args.repeat, loop=args.in_a_loop)
        for column in steps:
            columns[column] |= micro_batches.summary(times, column, args.micro_batches)
            columns[column]["tflops"] = args.micro_batches * layer.flops / columns[column]["ms"] / 1e9
    except Exception as error:  # whichever column it was, the times of none are complete
        columns = {column: common.failure(error) | columns[column] for column in columns}
    return layer.describe() | {"flops": layer.flops, "columns": {column: columns[column] for column in args.columns},
                               "ratios": ratios(columns)}


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


def report(record: common.Record, columns: Sequence[str], head: str = "tokens x in x out",
           averaged: Sequence[str] = FIRST8, averaged_name: str = "the first 8") -> None:
    """Print the table and note the geometric means over what was measured of the cases ``averaged``."""
    rows = [[head, "bf16 ms", *columns]]
    for name, result in record.results.items():
        rows += [line(name, result, columns), *micro_batches.lines(result, columns)]
    done = [record.results[name]["ratios"] for name in averaged if name in record.results]
    means = {column: common.geometric_mean([r[column] for r in done]) for column in columns
             if done and all(column in r for r in done)}
    rows.append([f"geometric mean, {len(done)} of {averaged_name}", "",
                 *(f"{means[c]:.3f}" if c in means else "" for c in columns)])
    record.save(geometric_mean={"over": len(done), "ratios": means})
    say(common.table(rows))


def profile(args: argparse.Namespace) -> None:
    """The kernels of one step of the asked column, for each shape."""
    check_folder(args.out.parent, "--out")
    for name, layer in args.shapes.items():
        step = Step(layer, args.profile, made(layer, args), Buffers(layer, args.device), args)
        case = micro_batches.cases({args.profile: step}, args.micro_batches)[args.profile]
        for i in range(3):
            case.reset(i)
            case.run(i)
        say(f"{args.profile} {name}, one step")
        rows = common.top_kernels(case, args.device, 5)
        common.show_kernels(rows)
        path = args.out.with_name(f"{args.out.stem}-{args.profile}-{name}.json")
        write_json(path, rows)
        common.release(args.device)


def add_arguments(parser: argparse.ArgumentParser, columns: Sequence[str], groups: Iterable[str], default: str) -> None:
    """What to measure of layers; ``default`` are the shapes."""
    parser.add_argument("--shapes", type=common.names, default=common.names(default),
                        help=f"comma-separated shapes and groups ({', '.join(groups)}); default: {default}")
    parser.add_argument("--columns", type=common.names, default=list(columns), metavar="NAMES",
                        help=f"of {', '.join(columns)}, or any policy of ours; default: these")
    parser.add_argument("--repeat", type=int, default=24, help="timed steps of each column (default %(default)s)")
    parser.add_argument("--profile", metavar="COLUMN", help="instead of timing print where this column's time goes")
    parser.add_argument("--compiler", default="inductor", help="torch.compile backend of the peers")
    parser.add_argument("--cuda-graphs", action="store_true", help="through CUDA graphs, all columns")
    parser.add_argument("--in-a-loop", action="store_true",
                        help="time steps that follow each other as in training, the host's time included, and not each "
                             "behind a full launch queue")
    parser.add_argument("--micro-batches", type=int, default=1, metavar="N",
                        help="of an optimizer step, timed together; above 1 also a later one by itself")
    parser.add_argument("--seed", type=int, default=0)


def parse_shapes(parser: argparse.ArgumentParser, wanted: Sequence[str], groups: Mapping[str, Sequence[str]],
                 layer: Callable[[str], Layer]) -> dict[str, Layer]:
    """The layer of each name, groups resolved; ends with the error of one that is none."""
    try:
        return {name: layer(name) for group in wanted for name in groups.get(group, (group,))}
    except ValueError as error:
        parser.error(str(error))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, common.COLUMNS, GROUPS, "first8,mlp,small,odd")
    parser.add_argument("--mlp", action="store_true", help="the MLPs only")
    common.add_arguments(parser, "bench_linear", "case")
    args = parser.parse_args(argv)
    args.shapes = parse_shapes(parser, ["mlp"] if args.mlp else args.shapes, GROUPS, Shape.parse)
    return args


def measure_all(args: argparse.Namespace, benchmark: str, **more: Any) -> common.Record | None:
    """The record of all shapes, those measured that are not in it yet; None where a profile was asked for instead."""
    deadline = common.Deadline(args.time_limit)
    settings = common.environment(args.device) | {"repeat": args.repeat, "seed": args.seed, "compiler": args.compiler,
                                                  "cuda_graphs": args.cuda_graphs,
                                                  "micro_batches": args.micro_batches, "in_a_loop": args.in_a_loop,
                                                  **more}
    say(common.describe(settings))
    if args.profile:
        profile(args)
        return None
    record = common.Record(args.out, benchmark, settings, args.fresh)
    for name, layer in args.shapes.items():
        earlier = record.results.get(name, {}).get("columns", {})
        if all("ms" in earlier.get(column, {}) for column in args.columns):
            continue
        if deadline.passed:
            say("time limit reached")
            break
        say(name)
        try:
            result = measure(layer, args)
        except Exception as error:
            say(f"  {common.failure(error)['failed']}\n  ending here; the same command continues")
            break
        record.put(name, result)
        common.release(args.device)
        say("  " + common.describe({column: f"{ratio:.2f}" for column, ratio in result["ratios"].items()}))
    return record


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    record = measure_all(args, "bench_linear")
    if record is not None:
        report(record, args.columns)


if __name__ == "__main__":
    main()
