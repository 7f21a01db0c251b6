"""What ``quartet build``, ``tune`` and ``cache`` do: compile the CUTLASS kernels ahead of time, measure which is
fastest, look after the cache."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from quartet.cli.doctor import table
from quartet.kernels.build_cache import BuildError, cache_dir, clear, entries
from quartet.kernels.cutlass.build import Build, build_all
from quartet.kernels.cutlass.configuration import Configuration
from quartet.kernels.cutlass.gemm import OUTPUT_OF
from quartet.kernels.cutlass.memory import jobs_allowed
from quartet.kernels.cutlass.selection import measured_classes
from quartet.kernels.cutlass.toolchain import toolchain
from quartet.kernels.cutlass.tune import random_operand, tune
from quartet.lowering.rates import kept

DTYPE_OF = {output: dtype for dtype, output in OUTPUT_OF.items()}


def build_kernels(configurations: Sequence[Configuration], jobs: int | None) -> int:
    """Build them into the cache, showing how far it is; the exit status: 0 when all are built.

    ``jobs``: at most so many at once; by default as many as there are processors, and never more than memory has room
    for.
    """
    try:
        tools = toolchain()
        for arch in dict.fromkeys(c.arch for c in configurations):
            tools.check(arch)
        print(f"nvcc {tools.nvcc_version} ({tools.nvcc}), CUTLASS {tools.cutlass_version}, cache {cache_dir()}")
    except BuildError as error:
        print(f"quartet: {error}", file=sys.stderr)
        return 1
    jobs = min(jobs or os.cpu_count() or 1, jobs_allowed())
    with _progress(len(configurations)) as report:
        outcomes = build_all(configurations, jobs, report)
    failed = [outcome for outcome in outcomes if isinstance(outcome, BuildError)]
    for failure in failed:
        print(f"quartet: {failure}", file=sys.stderr)
    fresh = sum(isinstance(outcome, Build) and outcome.fresh for outcome in outcomes)
    print(f"{fresh} built, {len(outcomes) - fresh - len(failed)} in the cache already"
          f"{f', {len(failed)} failed' if failed else ''}")
    return 1 if failed else 0


def tune_products(products: Sequence[tuple[str, str, tuple[int, int, int]]], device: torch.device) -> int:
    """Measure every kernel for (kind, output, (M, N, K)) on a GPU, keep and print the times; the exit status: 0 when
    each product was measured."""
    rows, status = [("product", "kernel", "µs", "TFLOPS", "")], 0
    for kind, output, (m, n, k) in products:
        name = f"{kind} {output} {m}×{n}×{k}"
        try:
            a, b = (random_operand(kind, extent, k, device) for extent in (m, n))
            times = tune(*a, *b, kind=kind, dtype=DTYPE_OF[output])
        except (BuildError, OSError, torch.OutOfMemoryError) as error:
            print(f"quartet: {name}: {error}", file=sys.stderr)
            status = 1
            continue
        for i, (configuration, time_) in enumerate(times.items()):
            rows.append(("" if i else name, configuration.tile_name, f"{time_:.1f}", f"{2e-6 * m * n * k / time_:.0f}",
                         "" if i else "from now on"))
    print(table(rows, indent=""))
    return status


def list_cache() -> str:
    """One row an object: its name, size, date, build time and registers, and whether it is intact; then what is tuned.
    """
    rows = [("kernel", "KiB", "built", "seconds", "registers", "")]
    total = 0
    for entry in entries():
        total += entry.size
        name = str(entry.notes.get("configuration") or entry.path.stem.rpartition("-")[0] or entry.path.stem)
        built = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.built))
        rows.append((name, f"{entry.size / 1024:.0f}", built, str(entry.notes.get("seconds", "")),
                     str(entry.notes.get("registers", "")), "" if entry.intact else "damaged, will be built again"))
    summary = f"{cache_dir(create=False)}: {_count(len(rows) - 1)}, {total / 2**20:.1f} MiB"
    tuned = [f"tuned for {device}: {', '.join(products)}" for device, products in measured_classes()]
    measured = [f"rates of {device}" for device in kept.listed()]
    return "\n".join([summary, *([table(rows)] if len(rows) > 1 else []), *tuned, *measured])


def cache_data() -> dict[str, Any]:
    """What :func:`list_cache` shows, JSON-serialisable: sizes in bytes, times in seconds since 1970."""
    objects = [{"file": str(entry.path), "bytes": entry.size, "built": entry.built, "intact": entry.intact,
                "notes": dict(entry.notes)} for entry in entries()]
    return {"folder": str(cache_dir(create=False)), "objects": objects, "rates": list(kept.listed()),
            "tuned": {device: list(products) for device, products in measured_classes()}}


def clear_cache(rates: bool = False) -> str:
    """Empty the cache, of what ``quartet calibrate`` measured only where ``rates``; what was removed and what stays."""
    before = kept.listed()
    count, size = clear(spared=None if rates else kept.PREFIX)
    stay = kept.listed()
    said = [f"{cache_dir(create=False)}: removed {_count(count)}, {size / 2**20:.1f} MiB"]
    said += [f"removed the rates of {device}" for device in before if device not in stay]
    said += [f"kept the rates of {device}, by which the default decides; `quartet cache clear --rates` removes them"
             for device in stay]
    return "\n".join(said)


def _count(objects: int) -> str:
    return f"{objects} object{'' if objects == 1 else 's'}"


def _said(outcome: Build | BuildError) -> str:
    if isinstance(outcome, BuildError):
        return "failed"
    if not outcome.fresh:
        return "in the cache"
    return f"{outcome.seconds:.0f} s, {outcome.registers} registers, {outcome.spills} bytes spilled"


@contextmanager
def _progress(total: int) -> Iterator[Callable[[Configuration, Build | BuildError | None], None]]:
    """What ``build_all`` reports to: a line a kernel, under it a bar where ``rich`` and a terminal are there."""
    lock, done = threading.Lock(), 0
    bar = _bar(total) if sys.stdout.isatty() else None

    def write(line: str) -> None:
        if bar is None:
            print(line, flush=True)
        else:
            bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def report(configuration: Configuration, outcome: Build | BuildError | None) -> None:
        nonlocal done
        with lock:
            if outcome is not None:
                done += 1
                write(f"[{done}/{total}] {configuration.name}: {_said(outcome)}")
            if bar is not None:
                bar.update(bar.task_ids[0], completed=done,
                           description=configuration.name if outcome is None else "compiling")

    if bar is None:
        yield report
        return
    with bar:
        yield report


def _bar(total: int) -> Any:
    """A bar of ``rich``, or None where it is not installed."""
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        return None
    bar = Progress(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    bar.add_task("compiling", total=total)
    return bar
