"""Measure the constants of the cost model on this device, and print them as an entry of ``lowering/rates.py``.

    python benchmarks/calibrate.py

Products of bf16 and of FP8 operands (row scales) over sizes from 1024 to 16384, and every pass that surrounds them on
bf16 tensors of four sizes, each timed as in the other benchmarks: random inputs, nothing in the L2 cache, medians.
Times are fitted by their relative error, a product's as 2·m·n·k / flops + m·n·output + launch and a pass's as
elements·constant + launch; the table shows how far the fit is off. Products are timed once more back to back for
``--sustain`` seconds, and the flops follow from that: a GPU lowers its clock under a load that lasts as training does,
on one H200 by a fifth.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import bench_quantize
import gpu_common as common
import numpy as np
import torch
from gpu_common import say

from quartet.lowering.rates import Rates

TOKENS = (2048, 8192, 16384)
WIDTHS = (1024, 2048, 4096, 8192, 14336)
TENSORS = ((2048, 1024), (4096, 2048), (8192, 4096), (16384, 8192))
TOGETHER = 20  # calls between two events
KERNELS = {"rows": "rows packed fold", "both axes": "both SR", "one axis": "columns SR",
           "requantise": "requantize SR", "fold": "fold", "unrotate": "unrotate"}
SUSTAINED = ((16384, 2048, 2048), (16384, 8192, 2048), (16384, 4096, 4096), (16384, 14336, 4096))
Sizes = tuple[int, ...]


class Call:
    """A function to time; a ``gpu_common.Case``."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function, self.result = function, None

    def reset(self, i: int) -> None:
        self.result = None

    def run(self, i: int) -> None:
        self.result = self.function()


def products(m: int, n: int, k: int, device: torch.device) -> dict[str, common.Case]:
    a, b = (torch.randn(rows, k, device=device, dtype=torch.bfloat16) for rows in (m, n))
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    a_scales, b_scales = torch.ones(m, 1, device=device), torch.ones(1, n, device=device)
    return {
        "bf16": Call(lambda: a @ b.t()),
        "fp8": Call(lambda: torch._scaled_mm(a8, b8.t(), a_scales, b_scales, out_dtype=torch.bfloat16,
                                             use_fast_accum=True)),
    }


def passes(rows: int, cols: int, device: torch.device) -> dict[str, common.Case]:
    from quartet.kernels.triton.quantize.cast import cast

    x, one = torch.randn(rows, cols, device=device, dtype=torch.bfloat16), torch.ones(1, device=device)
    made = bench_quantize.kernels(device, 0)
    cases: dict[str, common.Case] = {name: bench_quantize.Run(made[kernel], [x]) for name, kernel in KERNELS.items()}
    largest = torch.compile(lambda t: t.abs().amax(), dynamic=False)
    cases["amax"] = Call(lambda: largest(x))
    cases["cast"] = Call(lambda: cast(x, one, torch.float8_e4m3fn, plain=True, transposed=True))
    return cases


def fitted(features: Sequence[Sequence[float]], seconds: Sequence[float]) -> np.ndarray:
    """Coefficients ≥ 0 of least relative error."""
    a, t = np.array(features), np.array(seconds)
    kept = list(range(a.shape[1]))
    while True:
        found = np.linalg.lstsq(a[:, kept] / t[:, None], np.ones_like(t), rcond=None)[0]
        if (found >= 0).all():
            return np.array([dict(zip(kept, found, strict=True)).get(i, 0.0) for i in range(a.shape[1])])
        kept.pop(int(np.argmin(found)))


def fit(times: dict[str, dict[Sizes, float]], features: Callable[..., tuple[float, ...]]) -> dict[str, Any]:
    """Coefficients by name, and a line of the table: the fit's worst and median relative error."""
    found = {}
    for name, by_size in times.items():
        a, t = [features(*size) for size in by_size], list(by_size.values())
        coefficients = fitted(a, t)
        errors = [abs(float(np.dot(row, coefficients)) / second - 1) for row, second in zip(a, t, strict=True)]
        found[name] = {"coefficients": coefficients.tolist(), "median": statistics.median(errors), "worst": max(errors)}
    return found


def measure(cases_of: Callable[..., dict[str, common.Case]], sizes: Sequence[Sizes],
            args: argparse.Namespace) -> dict[str, dict[Sizes, float]]:
    """Seconds by name and size."""
    clock, times = common.Clock(args.device), {}
    for size in sizes:
        cases = cases_of(*size, args.device)
        for name, measured in clock.interleaved(cases, args.repeat).items():
            times.setdefault(name, {})[size] = 1e-3 * common.summary(measured)["ms"]
        common.release(args.device)
    return times


def sustained(case: common.Case, seconds: float) -> float:
    """Median seconds of one call in the second half of so many seconds of nothing else."""
    times, begin, end = [], torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        begin.record()
        for _ in range(TOGETHER):
            case.run(0)
        end.record()
        end.synchronize()
        times.append(1e-3 * begin.elapsed_time(end) / TOGETHER)
    return statistics.median(times[len(times) // 2:])


def under_load(gemm: dict[str, Any], seconds: float, device: torch.device) -> dict[str, float]:
    """dtype → flops of products that run for ``seconds``, what their outputs and launches take left out."""
    found: dict[str, list[float]] = {name: [] for name in gemm}
    for m, n, k in SUSTAINED:
        for name, case in products(m, n, k, device).items():
            _, output, launch = gemm[name]["coefficients"]
            took = sustained(case, seconds)
            found[name].append(2.0 * m * n * k / (took - m * n * output - launch))
        common.release(device)
    return {name: statistics.fmean(values) for name, values in found.items()}


def rates(device: str, gemm: dict[str, Any], line: dict[str, Any], loaded: dict[str, float]) -> Rates:
    """The fits as the cost model takes them, to three digits; flops under load where they were measured."""
    def constants(of: dict[str, Any], index: int) -> dict[str, float]:
        return {name: float(f"{data['coefficients'][index]:.3g}") for name, data in of.items()}

    bursts = {name: 1 / seconds for name, seconds in constants(gemm, 0).items()}
    flops = {name: float(f"{value:.3g}") for name, value in (bursts | loaded).items()}
    launch = statistics.median((constants(gemm, 2) | constants(line, 1)).values())
    return Rates(device, flops, constants(gemm, 1), constants(line, 0), launch)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--sustain", type=float, default=2.0, metavar="SECONDS", help="0: flops of bursts")
    common.add_arguments(parser, "calibrate", "size")
    args = parser.parse_args(argv)
    if args.device.type != "cuda":
        parser.error(f"this measures a GPU; --device is {args.device}")
    torch.manual_seed(0)
    environment = common.environment(args.device) | {"forward": str(bench_quantize.default_forward().a.spec)}
    sizes = [(m, n, k) for m, (n, k) in itertools.product(TOKENS, itertools.product(WIDTHS, WIDTHS)) if n * k < 1.2e8]
    by_product, by_pass = measure(products, sizes, args), measure(passes, TENSORS, args)
    gemm = fit(by_product, lambda m, n, k: (2.0 * m * n * k, float(m * n), 1.0))
    line = fit(by_pass, lambda rows, cols: (float(rows * cols), 1.0))
    rows = [["", "constants", "median error", "worst"]]
    rows += [[name, " ".join(f"{c:.3g}" for c in data["coefficients"]), f"{data['median']:.1%}", f"{data['worst']:.1%}"]
             for name, data in (gemm | line).items()]
    say(common.table(rows))
    loaded = under_load(gemm, args.sustain, args.device) if args.sustain else {}
    say(repr(rates(environment["device"], gemm, line, loaded)))
    record = common.Record(args.out, "calibrate", environment, fresh=True)
    for name, data in (gemm | line).items():
        record.put(name, data)
    record.save(under_load=loaded, times={name: {"x".join(map(str, size)): t for size, t in by.items()}
                       for name, by in (by_product | by_pass).items()})


if __name__ == "__main__":
    main()
