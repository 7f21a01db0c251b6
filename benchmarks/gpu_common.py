"""What the benchmarks share: columns to compare, a clock, the kernels that take the time, a resumable record.

Times on CUDA are between events on the stream. Before each timed call a large buffer is read often enough that the
call's launches are all queued when its first kernel starts: what is timed is the GPU, with nothing of the inputs left
in its L2 cache. The host's time to launch is recorded beside it. On a CPU the clock is ``time.perf_counter``.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
import torch.nn as nn
from output import check_folder, write_json

BASELINE = "bf16"
TORCHAO = {
    "torchao": "tensorwise",
    "torchao-rowwise": "rowwise",
    "torchao-rowwise-gw-hp": "rowwise_with_gw_hp",
}
OURS = ("fp8", "fp8-rowwise", "quartet")
COLUMNS = (BASELINE, *TORCHAO, *OURS)
HEADS = ("lm_head", "classifier")
FLUSH_BYTES = 256 << 20
MOST_FLUSHES = 64
LOOP = 10  # calls that follow each other


def prepare(column: str, model: nn.Module) -> nn.Module:
    """The model as the column trains it: torchao's columns swap its linear layers in place, all but output heads."""
    if column in TORCHAO:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        config = Float8LinearConfig.from_recipe_name(TORCHAO[column])
        convert_to_float8_training(model, config=config, module_filter_fn=lambda module, fqn: fqn not in HEADS)
    return model


def compiled(column: str, model: nn.Module, compiler: str = "inductor", policy: Any = None,
             cuda_graphs: bool = False, whole: bool = True) -> Callable[..., Any]:
    """``torch.compile`` of a prepared model, static shapes.

    Args:
        column: ``bf16``, one of ``TORCHAO``, or else the name of a recipe or ``.toml`` file for our backend, with
            ``:none`` or ``:gemm`` after it for the backend's option ``recompute``, or its option ``memory``, ``:0.7``.
        compiler: the torch.compile backend of the peers.
        policy: for our backend instead of the name; anything that its option ``policy`` takes.
        cuda_graphs: record and replay CUDA graphs, as ``mode="reduce-overhead"`` does.
        whole: refuse graph breaks.
    """
    allow_many_graphs()
    graphs = {"triton.cudagraphs": True} if cuda_graphs else {}
    if column == BASELINE or column in TORCHAO:
        return torch.compile(model, backend=compiler, options=graphs or None, dynamic=False, fullgraph=whole)
    name, _, kept = column.partition(":")
    option = {"recompute" if kept in ("none", "gemm") else "memory": kept} if kept else {}
    options = {"policy": name if policy is None else policy, **graphs, **option}
    return torch.compile(model, backend=our_backend(), options=options, dynamic=False, fullgraph=whole)


def allow_many_graphs() -> None:
    """Let many models, or functions of one definition, be compiled: they share a code object and its graphs."""
    torch._dynamo.config.recompile_limit = 64


def our_backend() -> Any:
    """``"quartet"`` where the package is installed, the function itself where it is only importable."""
    if "quartet" in torch.compiler.list_backends():
        return "quartet"
    from quartet.backend import quartet

    return quartet


class Case(Protocol):
    """Something to time; ``i`` counts the calls, so that it can take other buffers at each."""

    def reset(self, i: int) -> None: ...

    def run(self, i: int) -> None: ...


@dataclass(frozen=True)
class Time:
    """Milliseconds of one call: on the device, and until the host had launched all of it."""

    device: float
    host: float


class Clock:
    """Times calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.flush_ms = math.inf
        if self.cuda:
            self.buffer = torch.ones(FLUSH_BYTES // 4, device=device)
            self.flush_ms = min(self._elapsed(lambda: self._flush(8)).device / 8 for _ in range(3))

    def _flush(self, times: int) -> None:
        for _ in range(times):
            self.buffer.sum()

    def _elapsed(self, call: Callable[[], None], flushes: int = 1) -> Time:
        if not self.cuda:
            start = time.perf_counter()
            call()
            elapsed = 1e3 * (time.perf_counter() - start)
            return Time(elapsed, elapsed)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self._flush(flushes)
        begin.record()
        start = time.perf_counter()
        call()
        host = 1e3 * (time.perf_counter() - start)
        end.record()
        torch.cuda.synchronize()
        return Time(begin.elapsed_time(end), host)

    def time(self, case: Case, i: int, host_ms: float) -> Time:
        """One call of a case that takes the host about ``host_ms`` to launch."""
        case.reset(i)
        flushes = min(MOST_FLUSHES, math.ceil(1.5 * host_ms / self.flush_ms) + 1) if self.cuda else 0
        return self._elapsed(lambda: case.run(i), flushes)

    def in_a_loop(self, case: Case, first: int) -> Time:
        """The mean of ``LOOP`` calls that follow each other, as in training, from an idle device on: where the host is
        slower than the device, its time."""
        def call() -> None:
            for i in range(first, first + LOOP):
                case.reset(i)
                case.run(i)

        time = self._elapsed(call, 0)
        return Time(time.device / LOOP, time.host / LOOP)

    def interleaved(self, cases: dict[str, Case], repeat: int, warm_up: int = 3,
                    loop: bool = False) -> dict[str, list[Time]]:
        """``repeat`` times of each case, the cases taking turns and the first one changing every round; with ``loop``
        by :meth:`in_a_loop`."""
        hosts = {name: min(self.time(case, i, 0.0).host for i in range(warm_up)) for name, case in cases.items()}
        times: dict[str, list[Time]] = {name: [] for name in cases}
        names = list(cases)
        for i in range(repeat):
            for name in names[i % len(names):] + names[:i % len(names)]:
                case = cases[name]
                times[name].append(self.in_a_loop(case, i) if loop else self.time(case, i, hosts[name]))
        return times


def summary(times: Sequence[Time]) -> dict[str, Any]:
    """Medians in ms, and every device time."""
    return {
        "ms": statistics.median(t.device for t in times),
        "host_ms": statistics.median(t.host for t in times),
        "all_ms": [round(t.device, 5) for t in times],
    }


def top_kernels(case: Case, device: torch.device, calls: int, most: int = 30) -> list[dict[str, Any]]:
    """The kernels (on a CPU: operators) that take most of ``calls`` calls: name, launches and µs of one call, share."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        for i in range(calls):
            case.reset(i)
            case.run(i)
        synchronize(device)
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    events = [e for e in profiler.key_averages() if e.device_type == wanted and not e.is_user_annotation]
    spent = [(e.self_device_time_total if cuda else e.self_cpu_time_total, e) for e in events]
    total = sum(us for us, _ in spent) or 1.0
    ranked = sorted(spent, key=lambda pair: pair[0], reverse=True)[:most]
    return [{"kernel": e.key, "launches": e.count / calls, "us": us / calls, "share": us / total} for us, e in ranked]


def show_kernels(rows: Sequence[dict[str, Any]]) -> None:
    say(f"{'µs':>10} {'share':>6} {'launches':>8}  kernel")
    for row in rows:
        say(f"{row['us']:10.1f} {row['share']:6.1%} {row['launches']:8.1f}  {row['kernel'][:150]}")


class Deadline:
    """``passed`` becomes true ``seconds`` after now; never, where that is None."""

    def __init__(self, seconds: float | None) -> None:
        self.end = math.inf if seconds is None else time.monotonic() + seconds

    @property
    def passed(self) -> bool:
        return time.monotonic() >= self.end


class Record:
    """A JSON file that is whole after every ``put``, and from which a later run continues.

    Args:
        path: the file; with ``fresh`` what it holds is dropped.
        settings: what results have to share to be comparable.

    Raises:
        ValueError: the file holds results made with other settings. SystemExit: it cannot be written.
    """

    def __init__(self, path: Path, benchmark: str, settings: dict[str, Any], fresh: bool) -> None:
        check_folder(path.parent, "--out")
        self.path = path
        settings = json.loads(json.dumps(settings))
        self.data: dict[str, Any] = {"benchmark": benchmark, "settings": settings, "results": {}}
        if path.exists() and not fresh:
            earlier = json.loads(path.read_text(encoding="utf-8"))
            there, here = ({"benchmark": data.get("benchmark"), **data.get("settings", {})}
                           for data in (earlier, self.data))
            other = [f"{key} {there.get(key)!r} there, {here.get(key)!r} here" for key in sorted({*there, *here})
                     if there.get(key) != here.get(key)]
            if other:
                raise ValueError(f"{path} holds results of other settings: {'; '.join(other)}; name another --out, or "
                                 "give --fresh to drop them")
            self.data = earlier

    @property
    def results(self) -> dict[str, Any]:
        return self.data["results"]

    def put(self, key: str, value: Any) -> None:
        self.results[key] = value
        self.save()

    def save(self, **more: Any) -> None:
        self.data.update(more)
        write_json(self.path, self.data)


def environment(device: torch.device) -> dict[str, Any]:
    """The device and the versions that a time depends on."""
    if device.type == "cuda":
        from triton import __version__ as triton

        properties = torch.cuda.get_device_properties(device)
        return {"device": properties.name, "capability": [properties.major, properties.minor],
                "torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton,
                "python": platform.python_version()}
    return {"device": platform.processor() or "cpu", "torch": torch.__version__, "threads": torch.get_num_threads(),
            "python": platform.python_version()}


def describe(settings: dict[str, Any]) -> str:
    """One line of a dict."""
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def say(text: str = "") -> None:
    """Print at once, so that a run that is cut short leaves what it had."""
    print(text, flush=True)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as aligned lines, the first column to the left and the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(
        zip(row, widths, strict=True))) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(math.log(v) for v in values))


def failure(error: BaseException) -> dict[str, str]:
    """The record of a column that could not be measured: type and start of the message."""
    text = " ".join(str(error).partition("\n\nSet TORCHDYNAMO_VERBOSE")[0].split())
    return {"failed": f"{type(error).__name__}: {text[:600]}"}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Drop compiled code and what the allocator keeps of models that are gone."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def names(text: str) -> list[str]:
    """A comma-separated argument."""
    return [name for name in (part.strip() for part in text.split(",")) if name]


def add_arguments(parser: argparse.ArgumentParser, benchmark: str, unit: str, again: str = "measure") -> None:
    """The arguments of every benchmark; ``unit``: what a time limit stops before."""
    parser.add_argument("--device", type=torch.device, default=torch.device(default_device()))
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help=f"start no new {unit} after this")
    parser.add_argument("--fresh", action="store_true", help=f"{again} again what --out holds")
    parser.add_argument("--out", type=Path, default=default_out(benchmark), metavar="FILE",
                        help="default %(default)s, or below $OUT where that is set")


def default_out(benchmark: str) -> Path:
    """``bench-out/NAME.json``, or below the folder that ``$OUT`` names."""
    return Path(os.environ.get("OUT", "bench-out")) / f"{benchmark}.json"


def check_columns(parser: argparse.ArgumentParser, columns: Sequence[str], known: Sequence[str]) -> None:
    """End with an error that names the first column that is not known, and those that are."""
    unknown = [name for name in columns if name not in known]
    if unknown:
        parser.error(f"there is no column {unknown[0]!r}; possible: {', '.join(known)}")


def measured_once(args: argparse.Namespace, benchmark: str, keys: Sequence[str],
                  measure: Callable[[argparse.Namespace], dict[str, Any]]) -> dict[str, Any]:
    """What ``--out`` holds for these columns and the settings that ``keys`` name, else what ``measure`` finds now."""
    settings = environment(args.device) | {key: getattr(args, key) for key in keys}
    say(describe(settings))
    record, columns = Record(args.out, benchmark, settings, args.fresh), ",".join(args.columns)
    if columns not in record.results:
        record.put(columns, measure(args))
    return record.results[columns]
