"""Columns of a training step, each in a process of its own: what ``bench_train.py`` and ``bench_hf.py`` share.

Each column runs with empty compile caches. Reported are the median time of a step (between events at its two ends, the
steps following each other as in training), the host's time to launch one, the kernels that it launches, the largest
memory allocated in the timed steps, and the seconds from ``torch.compile`` to the end of the first step. The host's
time is that of a step which starts on an idle device; a step of more kernels than the device queues (about a thousand)
waits for the device too. With ``--together N`` so many columns compile at the same time, which shortens the run and
lengthens the compile times, and then take turns to be timed, each alone on the device. A column that fails says why,
and the others go on. A run continues the file it finds at ``--out``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_common as common
import torch
import torch.nn as nn
from gpu_common import say
from gpu_worker import Worker, WorkerError
from output import check_folder, write_json
from torch import Tensor

WARM_UP_STEPS = 3
BATCHES = 4
SHOWN = 40  # kernels that a record names
GIB = 2**30
COLUMNS = tuple(column for column in common.COLUMNS if column != "torchao-rowwise-gw-hp")


@dataclass(frozen=True)
class Work:
    """What is trained.

    Args:
        model: makes it in BF16, on the current default device.
        batches: count → so many batches on that device, what ``loss`` takes.
        loss: (compiled model, batch) → scalar.
        whole: the model is one graph; False where graph breaks are its own.
    """

    model: Callable[[], nn.Module]
    batches: Callable[[int], list[Any]]
    loss: Callable[[Callable[..., Any], Any], Tensor]
    whole: bool = True


class Trainer:
    """One column in training on random data; a ``gpu_common.Case``."""

    def __init__(self, column: str, work: Work, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.device: torch.device = args.device
        self.work = work
        with torch.device(self.device):
            model = work.model()
            self.batches = work.batches(BATCHES)
            common.synchronize(self.device)
        self.model = common.prepare(column, model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.losses: list[Tensor] = []
        start = time.perf_counter()
        self.compiled = common.compiled(column, self.model, args.compiler, cuda_graphs=args.cuda_graphs,
                                        whole=work.whole)
        self.step()
        common.synchronize(self.device)
        self.compile_s = time.perf_counter() - start
        for _ in range(WARM_UP_STEPS - 1):
            self.step()
        common.synchronize(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def reset(self, i: int) -> None:
        """Nothing: a step leaves no gradients."""

    def run(self, i: int) -> None:
        self.step()

    def step(self) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        loss = self.work.loss(self.compiled, self.batches[len(self.losses) % BATCHES])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.detach().clone())

    def timed(self, steps: int) -> list[float]:
        """Milliseconds of each of ``steps`` steps; one before them is not counted."""
        self.step()
        if self.device.type != "cuda":
            marks = [time.perf_counter()]
            for _ in range(steps):
                self.step()
                marks.append(time.perf_counter())
            return [1e3 * (b - a) for a, b in zip(marks, marks[1:], strict=False)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        events[0].record()
        for event in events[1:]:
            self.step()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]

    def host_ms(self) -> float:
        """Milliseconds until the host has launched a step on an idle device: the least of three."""
        times = []
        for _ in range(3):
            common.synchronize(self.device)
            start = time.perf_counter()
            self.step()
            times.append(1e3 * (time.perf_counter() - start))
        common.synchronize(self.device)
        return min(times)

    def kernels(self) -> dict[str, Any]:
        """How many a step launches, copies and fills included, and those that take most of the time; on a CPU
        operators."""
        rows = common.top_kernels(self, self.device, 1, most=10**6)
        return {"launches": round(sum(row["launches"] for row in rows)), "kernels": rows[:SHOWN]}

    def state(self) -> dict[str, Any]:
        peak = torch.cuda.max_memory_allocated() / GIB if self.device.type == "cuda" else None
        losses = torch.stack(self.losses).float().tolist()
        return {"peak_gib": peak, "losses": losses, "finite": all(math.isfinite(loss) for loss in losses),
                "parameters": sum(p.numel() for p in self.model.parameters())}


def work(column: str, what: Work, args: argparse.Namespace) -> None:
    """The process of one column: says that it is ready, then answers each line ``measure`` until its input ends."""
    trainer = Trainer(column, what, args)
    say(json.dumps({"compile_s": trainer.compile_s, "host_ms": trainer.host_ms(), **trainer.kernels()}))
    for _ in sys.stdin:
        say(json.dumps({"all_ms": trainer.timed(args.steps), **trainer.state()}))


def start(script: Path, column: str, name: str, args: argparse.Namespace) -> Worker:
    command = [sys.executable, str(script), "--worker", column, "--shapes", name, "--steps", str(args.steps), "--seed",
               str(args.seed), "--device", str(args.device), "--compiler", args.compiler,
               *(["--cuda-graphs"] if args.cuda_graphs else [])]
    threads = {"TORCHINDUCTOR_COMPILE_THREADS": str(max(1, (os.cpu_count() or 1) // args.together))}
    return Worker(command, threads if args.together > 1 else {}, args.column_limit)


def measure(script: Path, columns: Sequence[str], name: str, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Some columns of one shape: they compile at the same time and are timed in turns."""
    workers = {column: start(script, column, name, args) for column in columns}
    results: dict[str, dict[str, Any]] = {column: {"all_ms": []} for column in columns}

    def attempt(column: str, ask: bool) -> None:
        if "failed" in results[column]:
            return
        try:
            answer = workers[column].ask("measure") if ask else workers[column].answer()
            results[column] |= answer | {"all_ms": results[column]["all_ms"] + answer.get("all_ms", [])}
            if not ask:
                say(f"  {name} {column} compiled in {answer['compile_s']:.1f} s")
        except WorkerError as error:
            results[column] = {"failed": str(error)}
            say(f"  {name} {column} failed: {error}")

    try:
        for column in columns:
            attempt(column, ask=False)
        for _ in range(args.rounds):
            for column in columns:
                attempt(column, ask=True)
    finally:
        for worker in workers.values():
            worker.end()
    for result in results.values():
        if "failed" not in result:
            result |= {"ms": statistics.median(result["all_ms"]), "compiled_together": len(columns)}
    return results


def report(record: common.Record, columns: Sequence[str]) -> None:
    """Print a row a column, ratios against BF16 of the same shape."""
    for name, shape in record.results.items():
        baseline = shape.get(common.BASELINE, {})
        rows = [[name, "step ms", "speed x", "host ms", "launches", "of bf16", "peak GiB", "of bf16", "compile s",
                 "of bf16", "last loss"]]
        for column in columns:
            if (data := shape.get(column)) is None:
                continue
            if "failed" in data:
                rows.append([column, "failed", *[""] * 9])
                continue

            def ratio(key: str, data: dict[str, Any] = data, baseline: dict[str, Any] = baseline) -> str:
                return f"{data[key] / baseline[key]:.2f}" if data.get(key) and baseline.get(key) else ""

            speed = f"{baseline['ms'] / data['ms']:.3f}" if "ms" in baseline else ""
            peak = f"{data['peak_gib']:.1f}" if data["peak_gib"] else ""
            loss = f"{data['losses'][-1]:.3f}" if data["finite"] else "not finite"
            rows.append([column, f"{data['ms']:.1f}", speed, f"{data['host_ms']:.1f}", str(data["launches"]),
                         ratio("launches"), peak, ratio("peak_gib"), f"{data['compile_s']:.1f}", ratio("compile_s"),
                         loss])
        say(common.table(rows))


def profile(works: Mapping[str, Work], args: argparse.Namespace) -> None:
    """The kernels of one training step of the asked column, for each shape."""
    check_folder(args.out.parent, "--out")
    for name in args.shapes:
        trainer = Trainer(args.profile, works[name], args)
        say(f"{args.profile} {name}, one step, {statistics.median(trainer.timed(3)):.1f} ms")
        rows = common.top_kernels(trainer, args.device, 3, most=50)
        common.show_kernels(rows)
        path = args.out.with_name(f"{args.out.stem}-{args.profile}-{name}.json")
        write_json(path, rows)
        del trainer
        common.release(args.device)


def parse(works: Mapping[str, Work], default: Sequence[str], columns: Sequence[str], benchmark: str,
          description: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=common.names, default=list(default), metavar="NAMES",
                        help=f"of {', '.join(works)}; default {','.join(default)}")
    parser.add_argument("--columns", type=common.names, default=list(columns), metavar="NAMES",
                        help=f"of {', '.join(common.COLUMNS)}, or any policy of ours; default {','.join(columns)}")
    parser.add_argument("--steps", type=int, default=8, help="timed steps in a round (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of each column (default %(default)s)")
    parser.add_argument("--together", type=int, default=1, metavar="N", help="columns that compile at the same time")
    parser.add_argument("--profile", metavar="COLUMN", help="instead of timing print where this column's time goes")
    parser.add_argument("--compiler", default="inductor", help="torch.compile backend of the peers")
    parser.add_argument("--cuda-graphs", action="store_true", help="through CUDA graphs, all columns")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--column-limit", type=float, default=300, metavar="SECONDS",
                        help="longest wait for one answer of a column's process (default %(default)s)")
    common.add_arguments(parser, benchmark, "column")
    parser.add_argument("--worker", metavar="COLUMN", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name in args.shapes:
        if name not in works:
            parser.error(f"shape {name!r} does not exist; possible: {', '.join(works)}")
    return args


def main(script: Path, works: Mapping[str, Work], default: Sequence[str], columns: Sequence[str],
         description: str | None, argv: Sequence[str] | None) -> None:
    """The program ``script``, which trains ``works``, by default those named in ``default``, in ``columns``."""
    args = parse(works, default, columns, script.stem, description, argv)
    if args.worker:
        work(args.worker, works[args.shapes[0]], args)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # the processes of columns are ended then, too
    deadline = common.Deadline(args.time_limit)
    settings = common.environment(args.device) | {"seed": args.seed, "compiler": args.compiler, "steps": args.steps,
                                                  "rounds": args.rounds, "cuda_graphs": args.cuda_graphs}
    say(common.describe(settings))
    if args.profile:
        profile(works, args)
        return
    record = common.Record(args.out, script.stem, settings, args.fresh)
    for name in args.shapes:
        todo = [c for c in args.columns if "ms" not in record.results.get(name, {}).get(c, {})]
        for group in (todo[i:i + args.together] for i in range(0, len(todo), args.together)):
            if deadline.passed:
                say("time limit reached")
                break
            record.put(name, record.results.get(name, {}) | measure(script, group, name, args))
    report(record, args.columns)
