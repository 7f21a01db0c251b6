"""Optimizer steps of a Llama with 1.24 billion bf16 parameters: time, bytes of states, share of a copy's rate.

    python benchmarks/bench_optim.py
    python benchmarks/bench_optim.py --columns "torch fused,quartet e4m3 e5m2,torchao fp8" --repeat 50
    python benchmarks/bench_optim.py --device cpu --layers 1 --vocabulary 1000 --width 256

All optimizers step the same weights with the same gradients and take turns in one process. The bytes of a step are what
it has to read and write once: weight (bf16) and states both ways, the gradient one way; a method that moves more shows
a smaller share. ``first`` is the first step, with compilation and allocation. ``x torch`` and ``x low-bit``: the time
of torch's fused AdamW (bf16 states), and of the fastest optimizer of torchao and bitsandbytes, over the row's. A column
that fails says why, and the others go on. A run continues the file it finds at ``--out``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import gpu_common as common
import torch
from gpu_common import say
from torch import Tensor

COPY, TORCH = "copy", "torch fused"
PEERS = ("torchao fp8", "torchao 8bit", "bitsandbytes 8bit")
OURS = {
    "quartet e4m3 e5m2": {"state_format": ("e4m3", "e5m2")},
    "quartet e4m3 e5m2 SR": {"state_format": ("e4m3", "e5m2"), "stochastic_rounding": True},
    "quartet e4m3/256": {"state_format": "e4m3/256"},
    "quartet e4m3/256 SR": {"state_format": "e4m3/256", "stochastic_rounding": True},
    "quartet dynamic": {"state_format": "dynamic"},
    "quartet coat": {"state_format": "coat"},
    "quartet bf16": {"state_format": "bf16"},
    "quartet fp32": {"state_format": "fp32"},
    "quartet current": {"state_format": ("e4m3/tensor current", "e5m2/tensor current")},
    "quartet fp16 master": {"state_format": ("e4m3", "e5m2"), "master": "fp16"},
}
COLUMNS = (COPY, TORCH, *PEERS, *OURS)
SHARE_GOAL, STATE_GOAL, TORCH_GOAL, PEER_GOAL = 0.80, 0.27, 1.0, 1.2
GOALS_FOR = ("quartet e4m3 e5m2", "quartet e4m3 e5m2 SR", "quartet e4m3/256", "quartet e4m3/256 SR")


def shapes(layers: int, width: int, vocabulary: int) -> list[tuple[int, ...]]:
    """Parameters of a Llama 3.2 1B (tied embeddings) for 16 layers, width 2048 and 128256 words."""
    block = [(width, width), (width // 4, width), (width // 4, width), (width, width), (4 * width, width),
             (4 * width, width), (width, 4 * width), (width,), (width,)]
    return [(vocabulary, width), *block * layers, (width,)]


def make(column: str, params: list[Tensor]) -> torch.optim.Optimizer:
    """The optimizer of a column. Raises ImportError where its package is not there."""
    rate = {"lr": 1e-5, "weight_decay": 0.1}
    if column == TORCH:
        return torch.optim.AdamW(params, fused=True, **rate)
    if column.startswith("torchao"):
        from torchao import optim as torchao

        return (torchao.AdamWFp8 if column.endswith("fp8") else torchao.AdamW8bit)(params, **rate)
    if column.startswith("bitsandbytes"):
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(params, **rate)
    from quartet import optim

    return optim.AdamW(params, **rate, **OURS[column])


class Step:
    """Steps of one optimizer; a ``gpu_common.Case``."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.step: Callable[[], Any] = optimizer.step

    def reset(self, i: int) -> None:
        pass

    def run(self, i: int) -> None:
        self.step()


class Copy:
    """A copy of as many bytes as the weights have."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.source = torch.empty(sum(p.numel() for p in params), dtype=torch.bfloat16, device=params[0].device)
        self.target = torch.empty_like(self.source)

    def reset(self, i: int) -> None:
        pass

    def run(self, i: int) -> None:
        self.target.copy_(self.source)


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in the states, those inside tensor subclasses counted."""
    def size(x: Any) -> int:
        if not isinstance(x, Tensor):
            return 0
        parts = getattr(x, "tensor_attrs", None)  # torchao's
        return sum(size(getattr(x, a)) for a in parts) if parts else x.nbytes

    return sum(size(x) for state in optimizer.state.values() for x in state.values())


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All columns."""
    device = args.device
    torch.manual_seed(args.seed)
    params = [torch.nn.Parameter(torch.randn(s, dtype=torch.bfloat16, device=device) * 0.02) for s in
              shapes(args.layers, args.width, args.vocabulary)]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    weights = sum(p.nbytes for p in params)
    fp32 = 4 * weights  # bytes of two fp32 states
    cases: dict[str, common.Case] = {COPY: Copy(params)}
    columns: dict[str, dict[str, Any]] = {COPY: {"bytes": 2 * weights}}
    optimizers = []
    for column in args.columns:
        if column == COPY:
            continue
        before, start = allocated(device), time.perf_counter()
        try:
            optimizer = make(column, params)
            optimizer.step()
            common.synchronize(device)
        except Exception as error:
            columns[column] = common.failure(error)
            say(f"  {column:24} {columns[column]['failed']}")
            continue
        optimizers.append(optimizer)
        states = state_bytes(optimizer)
        columns[column] = {"first_s": time.perf_counter() - start, "state_bytes": states, "state_ratio": states / fp32,
                           "allocated_bytes": allocated(device) - before, "bytes": 3 * weights + 2 * states}
        cases[column] = Step(optimizer)
        say(f"  {column:24} first step {columns[column]['first_s']:.1f} s")
    for name, times in common.Clock(device).interleaved(cases, args.repeat).items():
        columns[name] |= common.summary(times)
    rate(columns)
    return {"parameters": sum(p.numel() for p in params), "tensors": len(params), "columns": columns}


def rate(columns: dict[str, dict[str, Any]]) -> None:
    """Add TB/s, share of the copy's, and the times of torch and of the fastest low-bit peer over each column's."""
    timed = {name: data for name, data in columns.items() if "ms" in data}
    for data in timed.values():
        data["tb_s"] = data["bytes"] / data["ms"] / 1e9
    peers = [timed[name]["ms"] for name in PEERS if name in timed]
    for name, data in timed.items():
        data["share"] = data["tb_s"] / timed[COPY]["tb_s"] if COPY in timed else None
        data["over_torch"] = timed[TORCH]["ms"] / data["ms"] if TORCH in timed and name != COPY else None
        data["over_peers"] = min(peers) / data["ms"] if peers and name != COPY else None


def missed(name: str, data: dict[str, Any]) -> str:
    """``<`` for a column of ours that misses a goal that can be told."""
    told = [(data.get("share"), SHARE_GOAL), (data.get("over_torch"), TORCH_GOAL), (data.get("over_peers"), PEER_GOAL)]
    low = any(value is not None and value < goal for value, goal in told)
    return "<" if name in GOALS_FOR and (low or data["state_ratio"] > STATE_GOAL) else ""


def report(result: dict[str, Any]) -> str:
    """The table."""
    rows = [["", "ms", "host ms", "states GB", "of fp32", "TB/s", "share", "x torch", "x low-bit", "first s", "goals"]]
    for name, data in result["columns"].items():
        if "ms" not in data:
            rows.append([name, *["failed"], *[""] * 9])
            continue
        cells = [f"{data['ms']:.3f}", f"{data['host_ms']:.2f}"]
        cells += ([f"{data['state_bytes'] / 1e9:.2f}", f"{data['state_ratio']:.3f}"] if "state_bytes" in data
                  else ["", ""])
        cells += [f"{data['tb_s']:.2f}", *("" if data.get(k) is None else f"{data[k]:.2f}"
                                           for k in ("share", "over_torch", "over_peers"))]
        cells += [f"{data['first_s']:.1f}" if "first_s" in data else "", missed(name, data) if name != COPY else ""]
        rows.append([name, *cells])
    return common.table(rows)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=common.names, default=list(COLUMNS), metavar="NAMES",
                        help=f"default {','.join(COLUMNS)}")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--repeat", type=int, default=30, help="timed steps of each column (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    common.add_arguments(parser, "bench_optim", "run")
    args = parser.parse_args(argv)
    common.check_columns(parser, args.columns, COLUMNS)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    result = common.measured_once(args, "bench_optim", ("layers", "width", "vocabulary", "repeat", "seed"), measure)
    say(f"{result['parameters'] / 1e9:.3f} billion parameters in {result['tensors']} tensors")
    say(report(result))


if __name__ == "__main__":
    main()
