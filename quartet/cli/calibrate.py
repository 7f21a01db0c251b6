"""What ``quartet calibrate`` does: measure how fast a GPU is and keep it, so that the default is decided by it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from quartet.cli.doctor import table
from quartet.kernels.build_cache import BuildError, cache_dir
from quartet.kernels.files import write_text
from quartet.lowering import rates
from quartet.lowering.rates import Rates, kept
from quartet.lowering.rates.measure import MeasurementError, measure
from quartet.runtime.devices import Target


def calibrate(device: torch.device, seconds: float, out: Path | None) -> int:
    """Measure ``device``, print its rates beside those that were taken until now, and keep them in the cache folder or
    write them to ``out``; the exit status."""
    before = rates.rates_of(Target.of(device))
    try:
        if out is None:
            cache_dir()
        begin = time.perf_counter()
        found = measure(device, seconds)
        taken = time.perf_counter() - begin
        if out is None:
            path = kept.keep(found)
        else:
            path = out
            write_text(out, json.dumps(kept.described(found), indent=1) + "\n")
    except (BuildError, MeasurementError, OSError) as error:
        print(f"quartet: {error}", file=sys.stderr)
        return 1
    source = "nothing" if before is None else before.source
    print(f"{found.device}, measured in {taken:.1f} s; until now {source}")
    print(table([("", "measured", "until now", "of it"), *_rows(found, before)], indent=""))
    print(f"kept in {path}; compilations from now on are decided by it, but not those of distributed runs (torchrun): "
          f"for them write a file with --out FILE and set {kept.VARIABLE}=FILE" if out is None else
          f"written to {path}; with {kept.VARIABLE}={path} all processes that read it are decided by it")
    return 0


def _rows(found: Rates, before: Rates | None) -> Iterator[tuple[str, str, str, str]]:
    for name, value in found.flops.items():
        yield f"{name} TFLOPS", *_compared(1e-12 * value, 1e-12 * before.flops.get(name, 0.0) if before else 0.0)
    for name, value in found.passes.items():
        yield f"{name}, ps an element", *_compared(1e12 * value, 1e12 * before.passes[name] if before else 0.0)


def _compared(value: float, before: float) -> tuple[str, str, str]:
    return f"{value:.3g}", f"{before:.3g}" if before else "–", f"{value / before:.2f}" if before else ""
