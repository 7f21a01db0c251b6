"""What is said while a graph is compiled: what was decided, also where a cache answers, and that it takes long.

What was decided lies beside what Inductor keeps, under the key of the graph, and goes with it.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from quartet.lowering.recipe.records import MatmulRecord
from quartet.passes.pipeline import Pipeline, signature
from quartet.runtime import compat

log = logging.getLogger("quartet")
PATIENCE = 30.0  # seconds before a compilation says that it goes on, and again after twice as many


def summary(records: Sequence[MatmulRecord]) -> str:
    """One line: how many matmuls are quantised, by which recipes and kernels, and why others are not."""
    ours = Counter(f"{r.recipe} by {r.kernel}" for r in records if r.lowered)
    alone = Counter(r.reason or "no reason recorded" for r in records if not r.lowered)
    parts = [f"{sum(ours.values())} of {len(records)} matmuls quantised"]
    if ours:
        parts.append(", ".join(f"{count} × {what}" for what, count in ours.most_common()))
    if alone:
        first, others = alone.most_common(3), len(alone) - 3
        parts.append("left alone: " + ", ".join(f"{count} × {why}" for why, count in first)
                     + (f" and {others} other reasons" if others > 0 else ""))
    return "; ".join(parts)


def decided(gm: torch.fx.GraphModule, inputs: Sequence[Any], step: Pipeline, weights: bool) -> None:
    """Log what was decided about a graph, and keep it for a process in which a cache answers. ``weights``: it has any;
    without records it then came from a cache."""
    path = _place(gm, inputs, step)
    if step.records:
        text = summary(step.records)
        log.info("compiled: %s", text)
        if path is not None:
            _keep(path, f"{time.strftime('%Y-%m-%d %H:%M')}: {text}")
    elif weights and log.isEnabledFor(logging.INFO):
        known = _read(path) if path is not None else ""
        log.info("from the compile cache: %s", f"compiled {known}" if known else "what was decided is not known")


def _place(gm: torch.fx.GraphModule, inputs: Sequence[Any], step: Pipeline) -> Path | None:
    """The file of a graph; None where no cache keeps it."""
    key = step.uuid()
    if key is None:
        return None
    text = repr((key, str(gm.graph), signature(inputs)))
    return Path(compat.inductor_cache_dir()) / "quartet" / hashlib.sha256(text.encode()).hexdigest()[:32]


def _keep(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        log.debug("what was decided is not kept: %s", error)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


@contextmanager
def patiently(gm: torch.fx.GraphModule) -> Iterator[None]:
    """Say that a compilation goes on, where it does for long."""
    begin, done = time.monotonic(), threading.Event()

    def wait() -> None:
        after = PATIENCE
        while not done.wait(after):
            log.warning("compiling a graph of %d operations: %.0f s so far", len(gm.graph.nodes),
                        time.monotonic() - begin)
            after *= 2

    thread = threading.Thread(target=wait, name="quartet-patience", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
