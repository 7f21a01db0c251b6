"""Measure the constants of the cost model on a GPU, in a few seconds.

A product runs back to back, because a GPU lowers its clock under a load that lasts as training does, on one H200 by a
fifth. Passes are the ops that graphs call, with the provider that graphs get, replayed from a CUDA graph, so that the
host's time is not in them and nobody waits for g++, which builds the launcher, on a tensor that no cache holds. What an
op folds to E4M3 is taken off where the fold is a pass of its own. What cannot be measured on a device, such as FP8
before Ada, follows from the H200's by the rate of a copy; what a kernel takes at least, and the host, are the H200's.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quartet.kernels.reference import random_signs
from quartet.lowering.ir.graph import aten
from quartet.lowering.ir.ops import fp8, fused
from quartet.lowering.rates import datasheet, shipped
from quartet.lowering.rates.constants import HOST, MEASURED, PASSES, Rates
from quartet.runtime.devices import Target
from quartet.runtime.replay.library import LAUNCHER

Call = Callable[[], Any]
ROWS, COLS = 16384, 8192  # of the tensor that passes work on
PRODUCTS = ((8192, 4096, 4096), (16384, 14336, 4096))
TOGETHER = 10  # calls between two events
FORWARD, BACKWARD = "e2m1/32 e8m0 even nearest", "e2m1/32 e8m0 headroom stochastic"
FOLDS = {"both axes": 2, "one axis": 1, "requantise": 1}  # how many folds the op of a pass makes beside it


class MeasurementError(RuntimeError):
    """Times from which no rates follow; the message says what was measured."""


def measure(device: torch.device, seconds: float = 0.4) -> Rates:
    """The constants of a GPU. ``seconds``: how long each product runs before it is timed, and while it is. Raises
    MeasurementError where that tells none."""
    target = Target.of(device)
    with torch.cuda.device(device), torch.no_grad(), LAUNCHER.postponed():
        passes = {name: _replayed(call) for name, call in _passes(device, target)}
        products = {(dtype, size): _sustained(call, seconds) for size in PRODUCTS
                    for dtype, call in _products(device, target, *size)}
        torch.cuda.empty_cache()
    return rates_from(target, passes, products)


def rates_from(target: Target, passes: Mapping[str, float],
               products: Mapping[tuple[str, tuple[int, int, int]], float]) -> Rates:
    """The constants that times tell: seconds of a pass over ``ROWS × COLS`` elements, and of products. Raises
    MeasurementError where a product, or the copy that the least of every pass follows from, tells no rate above 0."""
    known = shipped.RATES["h200"]
    for name, taken in passes.items():
        _beyond(known.launch if name == "copy" else 0.0, taken, f"a pass {name!r} over {ROWS} × {COLS} elements")
    each = {name: (taken - known.launch) / (ROWS * COLS) for name, taken in passes.items()}
    for name, folds in FOLDS.items():
        if name in each:
            each[name] -= folds * (each["fold"] + known.launch / (ROWS * COLS))
    slower = each["copy"] / known.passes["copy"]
    each = {name: max(each.get(name, slower * known.passes[name]), 0.1 * each["copy"]) for name in PASSES}
    output = {dtype: slower * known.output["bf16"] * size / 2 for dtype, size in datasheet.RESULT_BYTES.items()}
    flops: dict[str, list[float]] = {}
    for (dtype, (m, n, k)), taken in products.items():
        flops.setdefault(dtype, []).append(2.0 * m * n * k / _beyond(
            m * n * output[dtype] + known.launch, taken, f"a product {m} × {n} × {k} in {dtype}"))
    mean = {dtype: statistics.fmean(values) for dtype, values in flops.items()}
    if target.gpu is not None and target.gpu.fp4:  # no measurement of its own yet
        mean["fp4"] = datasheet.rates(target.gpu).flops["fp4"]
    return Rates(str(target.name), _rounded(mean), _rounded({dtype: output[dtype] for dtype in mean}), _rounded(each),
                 known.launch, HOST, MEASURED)


def _beyond(known: float, taken: float, what: str) -> float:
    """What of a time is more than is known to be in it. Raises MeasurementError where nothing is."""
    if not 0 < taken - known < math.inf:
        raise MeasurementError(f"{what} was measured to take {1e6 * taken:.3g} µs, of which {1e6 * known:.3g} are its "
                               "launch and result: no rate follows from that; measure again, with more --seconds, "
                               "while nothing else uses the GPU")
    return taken - known


def _passes(device: torch.device, target: Target) -> Iterator[tuple[str, Call]]:
    """(pass, what to time), the copy first."""
    x, one = _random(device, ROWS, COLS), torch.ones(1, dtype=torch.float32, device=device)
    seed = torch.tensor(0, dtype=torch.int64, device=device)
    signs = random_signs(seed, 3, 32)
    spec, again = (32, signs, FORWARD, None, 0, None), (32, signs, BACKWARD, seed, 7, None)
    yield "copy", partial(torch.clone, x)
    yield "amax", partial(torch.linalg.vector_norm, x, float("inf"))
    yield "unrotate", lambda: fused.UNROTATE(x, None, 32, signs, 4 / 3, COLS, x.dtype)
    if target.lacks("fp8 tensor cores") is not None or target.lacks("nvidia instructions") is not None:
        return
    codes, scales, *_ = fused.QUANTIZE(x, *spec, True, False)
    yield "fold", lambda: fused.FOLD(codes, scales, FORWARD)
    yield "rows", lambda: fused.QUANTIZE(x, *spec, True, True)
    yield "both axes", lambda: fused.QUANTIZE_BOTH(x, *again, *again)
    yield "one axis", lambda: fused.QUANTIZE(x.t(), *again, False, True)
    yield "requantise", lambda: fused.REQUANTIZE(codes, scales, FORWARD, *again, False, True)
    yield "cast", lambda: fp8.CAST(x, one, "e4m3", True, True)


def _products(device: torch.device, target: Target, m: int, n: int, k: int) -> Iterator[tuple[str, Call]]:
    a, b = (_random(device, rows, k) for rows in (m, n))
    yield "bf16", lambda: a @ b.t()
    if target.lacks("fp8 tensor cores") is None:
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        of_a, of_b = (torch.ones(size, dtype=torch.float32, device=device) for size in ((m, 1), (1, n)))
        yield "fp8", lambda: aten._scaled_mm.default(a8, b8.t(), of_a, of_b, None, None, torch.bfloat16, True)
    if target.lacks("int8 tensor cores") is None:
        ai, bi = (t.mul(32).clamp(-127, 127).to(torch.int8) for t in (a, b))
        yield "int8", lambda: aten._int_mm.default(ai, bi.t())


def _random(device: torch.device, rows: int, cols: int) -> Tensor:
    """Of a generator of its own: a run draws the same numbers whether it measures or not."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(rows, cols, device=device, dtype=torch.bfloat16, generator=generator)


def _replayed(call: Call) -> float:
    """Median seconds of one call among those of a CUDA graph."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(TOGETHER):
            call()
    times = [_elapsed(graph.replay) / TOGETHER for _ in range(5)]
    return statistics.median(times)


def _sustained(call: Call, seconds: float) -> float:
    """Median seconds of one call, after so many seconds of nothing else, in as many."""
    def batch() -> None:
        for _ in range(TOGETHER):
            call()

    times: list[float] = []
    begin = time.perf_counter()
    while not times or time.perf_counter() < begin + 2 * seconds:
        taken = _elapsed(batch) / TOGETHER
        if not times or time.perf_counter() >= begin + seconds:
            times.append(taken)
    return statistics.median(times)


def _elapsed(run: Call) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return 1e-3 * begin.elapsed_time(end)


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.3g}") for name, value in values.items()}
