"""A training step under FSDP2, per block: tokens a second, memory and bytes sent, with and without packed gathers.

    torchrun --nproc-per-node 2 benchmarks/bench_fsdp.py --model 1b --time-limit 145
    torchrun --nproc-per-node 2 benchmarks/bench_fsdp.py --model 8b --time-limit 145
    torchrun --nproc-per-node 2 benchmarks/bench_fsdp.py --check --fresh
    torchrun --nproc-per-node 2 benchmarks/bench_fsdp.py --model tiny --eager --device cpu         # a dry run, gloo

``bf16`` is Inductor's, ``torchao`` its tensorwise FP8 with its own FP8 all-gather, ``fp8`` and ``quartet`` ours, with
``+packed`` after ``quartet.distributed.pack_all_gather``. Weights and AdamW's states are fp32 shards, products and
reductions BF16; embedding, head and loss run in eager code. Each column compiles once and is timed twice, resharding
after forward and not. Bytes are what ``torch.distributed`` is asked for in a step, of a gather those of its result.
``--check`` compares instead of timing: see ``fsdp_check.py``.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from datetime import timedelta
from typing import Any

os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # NVLink multicast stays off

import fsdp_check
import fsdp_columns as columns
import gpu_common as common
import torch
import torch.distributed as dist
import traffic
from gpu_common import say

GIB = 2**30


def measure(name: str, shape: columns.Shape, args: argparse.Namespace) -> dict[str, Any]:
    """One column, timed both ways."""
    start = time.perf_counter()
    run = columns.prepared(name, shape, args.device, args.eager)
    run.step()
    common.synchronize(args.device)
    found: dict[str, Any] = {"compile_s": time.perf_counter() - start, "gathered": run.gathered}
    for after in (True, False):
        run.reshard(after)
        found["reshard" if after else "keep"] = _timed(run, args)
    found["losses"] = torch.stack(run.losses).float().tolist()
    return found


def _timed(run: columns.Run, args: argparse.Namespace) -> dict[str, Any]:
    for _ in range(args.warm_up):
        run.step()
    cuda = args.device.type == "cuda"
    common.synchronize(args.device)
    dist.barrier()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    marks = []
    for _ in range(args.steps + 1):
        if cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            marks.append(event)
        else:
            marks.append(time.perf_counter())
        if len(marks) <= args.steps:
            run.step()
    common.synchronize(args.device)
    pairs = zip(marks, marks[1:], strict=False)
    times = sorted(a.elapsed_time(b) if cuda else 1e3 * (b - a) for a, b in pairs)
    ms, peak = _largest(times[len(times) // 2], torch.cuda.max_memory_allocated() / GIB if cuda else 0.0, args.device)
    sent = traffic.of(run.step)
    return {"ms": ms, "tokens_per_s": 1e3 * run.shape.tokens * dist.get_world_size() / ms, "peak_gib": peak,
            "bytes": sent.rows(), "calls": {" ".join(key): n for key, n in sent.calls.items()}}


def _largest(ms: float, peak: float, device: torch.device) -> tuple[float, float]:
    """Of all ranks: the slowest is the step's time."""
    both = torch.tensor([ms, peak], device=device)
    dist.all_reduce(both, dist.ReduceOp.MAX)
    return float(both[0]), float(both[1])


def in_time(deadline: common.Deadline, device: torch.device) -> bool:
    """What rank 0 says, for all."""
    answer = torch.tensor([not deadline.passed], dtype=torch.int32, device=device)
    dist.broadcast(answer, 0)
    return bool(answer.item())


def _gathered(found: dict[str, Any], dtype: str = "") -> int:
    """Bytes of all-gathers, in all dtypes or in one: those of blocks with codes in them are bytes."""
    return sum(n for key, n in found["bytes"].items() if key.startswith("all_gather") and key.endswith(dtype))


def show(results: dict[str, Any]) -> str:
    rows = [("", "reshard", "step ms", "tokens/s", "of BF16", "peak GiB", "gathered MB", "of BF16", "blocks",
             "reduced MB", "compile s")]
    base = results.get("bf16", {})
    for name, found in results.items():
        if "failed" in found:
            rows.append((name, "failed:", found["failed"][:90], *[""] * 8))
            continue
        for way in ("reshard", "keep"):
            one, of = found[way], base.get(way)
            gathered, whole = (_gathered(each) if each else 0 for each in (one, of))
            codes = _gathered(one, "uint8")
            blocks = codes / (whole - gathered + codes) if codes and whole else 0.0
            reduced = sum(n for key, n in one["bytes"].items() if key.startswith("reduce_scatter"))
            rows.append((name, "yes" if way == "reshard" else "no", f"{one['ms']:.2f}", f"{one['tokens_per_s']:.0f}",
                         f"{of['ms'] / one['ms']:.3f}" if of else "", f"{one['peak_gib']:.2f}", f"{gathered / 1e6:.1f}",
                         f"{gathered / whole:.3f}" if whole else "", f"{blocks:.3f}" if blocks else "",
                         f"{reduced / 1e6:.1f}", f"{found['compile_s']:.0f}"))
    return common.table(rows)


def compare(args: argparse.Namespace, shape: columns.Shape) -> dict[str, Any]:
    """All columns that fit into the time, in order."""
    deadline, results = common.Deadline(args.time_limit), dict[str, Any]()
    for name in args.columns:
        if not in_time(deadline, args.device):
            results[name] = {"failed": f"not measured: {args.time_limit:.0f} s had passed"}
            continue
        try:
            results[name] = measure(name, shape, args)
        except Exception as error:  # the same on all ranks, which run the same code
            results[name] = common.failure(error)
        gc.collect()
        common.release(args.device)
        if dist.get_rank() == 0:
            say(f"{name}: {results[name].get('failed') or results[name]['gathered'] or 'done'}")
    return results


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_arguments(parser, "bench_fsdp", "column")
    parser.add_argument("--model", choices=("1b", "8b", "tiny"), default="1b")
    parser.add_argument("--layers", type=int, help="other than the default of the model, which the label says")
    parser.add_argument("--columns", type=common.names, default=list(columns.COLUMNS))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="no code generation: a dry run, whose times say nothing")
    parser.add_argument("--check", action="store_true", help="compare numbers instead of timing")
    parser.add_argument("--only", default="", help="of the comparisons those whose name starts so")
    return parser.parse_args()


def main() -> None:
    args = parsed()
    cuda = args.device.type == "cuda"
    if args.check:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for to add up in a fixed order
    if cuda:
        args.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(args.device)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=120),
                            **({"device_id": args.device} if cuda else {}))
    common.allow_many_graphs()
    shape = columns.shape(args.model, args.layers or (fsdp_check.LAYERS if args.check else None))
    settings = common.environment(args.device) | {"ranks": dist.get_world_size(), "model": shape.label}
    first = dist.get_rank() == 0
    if first:
        say(common.describe(settings))
    start = time.perf_counter()
    results = fsdp_check.check(shape, args) if args.check else compare(args, shape)
    if first:
        if not args.check:
            say(show(results))
        say(f"{time.perf_counter() - start:.0f} s")
        record = common.Record(args.out, "bench_fsdp", settings, args.fresh)
        record.put(f"{args.model} check" if args.check else args.model, results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
