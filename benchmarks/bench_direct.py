"""Optimizer steps of the matrices of a Llama with 1.24 billion parameters, weights being codes only: time and bytes.

    python benchmarks/bench_direct.py
    python benchmarks/bench_direct.py --columns "torch fused,8,ternary" --bucket-mb 64,1024 --repeat 20
    python benchmarks/bench_direct.py --device cpu --layers 1 --width 256 --repeat 2

``direct.Optimizer(quartet.optim.AdamW)`` at 8 bits and ternary steps the linear layers of all blocks (a direct model's
embedding and norms are plain parameters), with its fused kernels and, as ``REFERENCE``, with the tensor operations
that specify them; ``torch fused`` is torch's fused AdamW on bf16 weights of the same shapes. The bytes of a step are
what the kernels read and write: of a weight 4 + code to dequantise, 2 + 4 for the gradient in fp32, 12 and both
states twice for the inner step, 4 + two codes to round. torch's: weight and states (bf16) both ways, the gradient one
way. ``share`` is of the rate of a copy on the device, ``x torch`` torch's time over the row's, ``MB`` the optimizer's
``bucket_bytes``. A run continues the file that it finds at ``--out``.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Sequence
from typing import Any
from unittest import mock

import bench_optim as optim_bench
import gpu_common as common
import torch
from gpu_common import say
from torch import Tensor

from quartet import direct, optim
from quartet.runtime.direct import rounding

COPY, TORCH, REFERENCE = "copy", "torch fused", " reference"
BITS = ("8", "ternary")
COLUMNS = (COPY, TORCH, *BITS, *(bits + REFERENCE for bits in BITS))
RATE = {"lr": 1e-4, "weight_decay": 0.1}


class Step:
    """Steps of one optimizer, with the kernels or without; a ``gpu_common.Case``."""

    def __init__(self, optimizer: torch.optim.Optimizer, reference: bool) -> None:
        self.optimizer, self.reference = optimizer, reference

    def reset(self, i: int) -> None:
        pass

    def run(self, i: int) -> None:
        with mock.patch.object(rounding, "kernels_for", lambda _: None) if self.reference else contextlib.nullcontext():
            self.optimizer.step()


def made(bits: str | None, shapes: Sequence[tuple[int, ...]], grads: Sequence[Tensor], bucket_mb: int
         ) -> torch.optim.Optimizer:
    """An optimizer of fresh weights, which have ``grads``: low-bit ones, or torch's on bf16 for None."""
    params = []
    for shape, grad in zip(shapes, grads, strict=True):
        weight = torch.randn(shape, dtype=torch.bfloat16, device=grad.device) * 0.02
        param = torch.nn.Parameter(weight if bits is None else direct.LowBitWeight.of(weight, bits))
        param.grad = grad
        params.append(param)
    if bits is None:
        return torch.optim.AdamW(params, fused=True, **RATE)
    return direct.Optimizer(optim.AdamW(params, **RATE), bucket_bytes=bucket_mb << 20)


def moved(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of a step, see above."""
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    states = optim_bench.state_bytes(optimizer)
    if not isinstance(optimizer, direct.Optimizer):
        return sum(3 * p.nbytes for p in weights) + 2 * states
    return sum(26 * w.numel() + 3 * w.stored_bytes() for w in weights) + 2 * states


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All columns."""
    device = args.device
    torch.manual_seed(args.seed)
    shapes = [s for s in optim_bench.shapes(args.layers, args.width, 1)[1:] if len(s) == 2]
    grads = [torch.randn(s, dtype=torch.bfloat16, device=device) * 1e-3 for s in shapes]
    cases: dict[str, common.Case] = {}
    columns: dict[str, dict[str, Any]] = {}
    if COPY in args.columns:
        cases[COPY], columns[COPY] = optim_bench.Copy(grads), {"bytes": 2 * sum(g.nbytes for g in grads)}
    for column in args.columns:
        if column == COPY:
            continue
        bits = None if column == TORCH else column.removesuffix(REFERENCE)
        buckets = [args.bucket_mb[0]] if bits is None or column.endswith(REFERENCE) else args.bucket_mb
        for bucket in buckets:
            name = column if len(buckets) == 1 else f"{column} {bucket} MB"
            start = time.perf_counter()
            try:
                case = Step(made(bits, shapes, grads, bucket), column.endswith(REFERENCE))
                case.run(0)
                common.synchronize(device)
            except Exception as error:
                columns[name] = common.failure(error)
                say(f"  {name:24} {columns[name]['failed']}")
                continue
            columns[name] = {"first_s": time.perf_counter() - start, "bytes": moved(case.optimizer),
                             "bucket_mb": None if bits is None else bucket}
            if isinstance(case.optimizer, direct.Optimizer):
                columns[name]["flipped"] = case.optimizer.flipped()
            cases[name] = case
            say(f"  {name:24} first step {columns[name]['first_s']:.1f} s")
    for name, times in common.Clock(device).interleaved(cases, args.repeat, warm_up=2).items():
        columns[name] |= common.summary(times)
    for data in columns.values():
        if "ms" in data:
            data["tb_s"] = data["bytes"] / data["ms"] / 1e9
            copy = columns[COPY]["bytes"] / columns[COPY]["ms"] / 1e9 if COPY in cases else None
            data["share"] = data["tb_s"] / copy if copy else None
            data["over_torch"] = columns[TORCH]["ms"] / data["ms"] if TORCH in cases else None
    return {"parameters": sum(g.numel() for g in grads), "tensors": len(grads), "columns": columns}


def report(result: dict[str, Any]) -> str:
    """The table."""
    rows = [["", "ms", "host ms", "bytes a weight", "TB/s", "share", "x torch", "flipped", "first s"]]
    for name, data in result["columns"].items():
        if "ms" not in data:
            rows.append([name, "failed", *[""] * 7])
            continue
        rows.append([name, f"{data['ms']:.3f}", f"{data['host_ms']:.2f}", f"{data['bytes'] / result['parameters']:.2f}",
                     f"{data['tb_s']:.2f}", *("" if data.get(k) is None else f"{data[k]:.2f}" for k in
                                              ("share", "over_torch")),
                     f"{data['flipped']:.2%}" if "flipped" in data else "",
                     f"{data['first_s']:.1f}" if "first_s" in data else ""])
    return common.table(rows)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=common.names, default=list(COLUMNS), metavar="NAMES",
                        help=f"default {','.join(COLUMNS)}")
    parser.add_argument("--bucket-mb", type=lambda text: [int(n) for n in common.names(text)], default=[64, 256, 1024],
                        metavar="NUMBERS", help="bucket_bytes of the fused columns (default 64,256,1024)")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--repeat", type=int, default=10, help="timed steps of each column (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    common.add_arguments(parser, "bench_direct", "run")
    args = parser.parse_args(argv)
    common.check_columns(parser, args.columns, COLUMNS)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    result = common.measured_once(args, "bench_direct", ("layers", "width", "bucket_mb", "repeat", "seed"), measure)
    say(f"{result['parameters'] / 1e9:.3f} billion weights in {result['tensors']} matrices")
    say(report(result))


if __name__ == "__main__":
    main()
