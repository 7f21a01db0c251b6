"""A training step on a CPU: ``backend="quartet"`` against its peer ``torch.compile(backend="inductor")``, in one run.

    python benchmarks/cpu_step.py
    python benchmarks/cpu_step.py --policy quartet-paper --rounds 21 --skip-cold

The model is the Llama of ``examples/``, fp32, 1024 tokens as 4 × 256. Three figures of each:

- cold: from ``torch.compile`` to the end of the first step, in a process and cache folders of its own;
- steady: forward, backward and fused AdamW, the median over rounds in which the two take turns in one process;
- saved: bytes of the distinct storages kept between forward and backward, beside parameters, buffers and inputs.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
from console import Console, Table
from llama import PRESETS, VOCABULARY, Llama
from measure import saved_for_backward
from output import check_folder, write_json
from torch import Tensor

PEER, OURS = BACKENDS = ("inductor", "quartet")
WARM_UP_STEPS = 3
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "QUARTET_CACHE_DIR")


@dataclass(frozen=True)
class Figure:
    """One line of the table; ``goal`` is the largest ratio of ours to the peer's that is good enough."""

    key: str
    title: str
    scale: float
    goal: float


FIGURES = (
    Figure("cold_s", "cold first step, s", 1.0, 1.5),
    Figure("steady_s", "steady step, ms", 1e3, 2.0),
    Figure("saved_bytes", "saved for backward, MB", 1e-6, 0.6),
)


class Contender:
    """The model under one backend; ``step()`` is one whole update."""

    def __init__(self, backend: str, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.model = Llama(PRESETS[args.size], args.seq)
        tokens = torch.randint(VOCABULARY, (args.batch, args.seq + 1))
        self.batch: tuple[Tensor, Tensor] = (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        options = {"policy": args.policy} if backend == OURS and args.policy else None
        self.start = time.perf_counter()
        self.compiled: Callable[..., Tensor] = torch.compile(self.model, backend=backend, options=options)

    def step(self) -> None:
        self.compiled(*self.batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def cold(self) -> float:
        """Seconds from ``torch.compile`` to the end of the first step."""
        self.step()
        return time.perf_counter() - self.start

    def timed_step(self) -> float:
        start = time.perf_counter()
        self.step()
        return time.perf_counter() - start

    def saved_bytes(self) -> int:
        return saved_for_backward(self.compiled, self.model, *self.batch)


def cold_seconds(backend: str, args: argparse.Namespace, caches: Path) -> float:
    """The cold first step of one backend in a fresh process, with ``caches`` as its empty cache folders."""
    environment = os.environ | {name: str(caches / name) for name in CACHES}
    command = [sys.executable, __file__, "--only-cold", backend, *forwarded(args)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


def forwarded(args: argparse.Namespace) -> list[str]:
    keys = ("size", "batch", "seq", "seed") + (("policy",) if args.policy else ())
    return [part for key in keys for part in (f"--{key}", str(getattr(args, key)))]


def steady(args: argparse.Namespace, console: Console) -> dict[str, dict[str, Any]]:
    """Interleaved step times and saved bytes of both; who goes first changes every round."""
    contenders = {}
    for backend in BACKENDS:
        console.print(f"compiling with {backend}")
        contenders[backend] = Contender(backend, args)
        for _ in range(WARM_UP_STEPS):
            contenders[backend].step()
    times: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
    for round_ in range(args.rounds):
        for backend in BACKENDS if round_ % 2 == 0 else BACKENDS[::-1]:
            times[backend].append(contenders[backend].timed_step())
    return {
        backend: {
            "steady_s": statistics.median(times[backend]),
            "steady_all_s": times[backend],
            "saved_bytes": contenders[backend].saved_bytes(),
        }
        for backend in BACKENDS
    }


def show(results: dict[str, dict[str, Any]], console: Console) -> dict[str, float]:
    """Print the table; the ratios of ours to the peer's by figure."""
    table = Table()
    for title in ("", f"{PEER} (peer)", OURS, "ratio", "goal", ""):
        table.add_column(title, justify="right" if title else "left")
    ratios = {}
    for figure in FIGURES:
        if figure.key in results[PEER]:
            peer, ours = (results[backend][figure.key] for backend in BACKENDS)
            ratios[figure.key] = ours / peer
            verdict = "met" if ours / peer <= figure.goal else "missed"
            table.add_row(figure.title, f"{peer * figure.scale:.1f}", f"{ours * figure.scale:.1f}",
                          f"{ours / peer:.3f}", f"≤ {figure.goal}", verdict)
    console.print(table)
    return ratios


def processor() -> str:
    """The processor's name as Linux gives it, else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=PRESETS, default="demo", help="default: 512 wide, 8 layers")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--policy", help="recipe name or .toml file; default: quartet's own")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved steady steps of each")
    parser.add_argument("--skip-cold", action="store_true", help="leave the cold first steps out")
    parser.add_argument("--only-cold", choices=BACKENDS, help="print the cold seconds of one backend and end")
    parser.add_argument("--out", type=Path, default=Path("bench-out"), metavar="DIR")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.only_cold:
        print(Contender(args.only_cold, args).cold())
        return
    check_folder(args.out, "--out")
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    console.print(f"{PRESETS[args.size]}\n{args.batch} × {args.seq} tokens, fp32, torch {torch.__version__}, "
                  f"{torch.get_num_threads()} threads of {processor()}, load average {os.getloadavg()[0]:.1f}")
    cold: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        shared = Path(folder, "shared")
        for backend in () if args.skip_cold else BACKENDS:
            cold[backend] = cold_seconds(backend, args, Path(folder, backend))
            console.print(f"cold first step with {backend}: {cold[backend]:.1f} s")
            shutil.copytree(Path(folder, backend), shared, dirs_exist_ok=True)
        if cold:  # what the cold processes compiled is not compiled a third time
            os.environ.update({name: str(shared / name) for name in CACHES})
        results = steady(args, console)
    for backend, seconds in cold.items():
        results[backend]["cold_s"] = seconds
    ratios = show(results, console)
    record = {
        "model": args.size, "tokens": [args.batch, args.seq], "policy": args.policy, "rounds": args.rounds,
        "torch": torch.__version__, "threads": torch.get_num_threads(), "processor": processor(),
        "load_average": os.getloadavg(), "goals": {f.key: f.goal for f in FIGURES}, "ratios": ratios,
        "results": results,
    }
    write_json(args.out / "cpu_step.json", record)


if __name__ == "__main__":
    main()
