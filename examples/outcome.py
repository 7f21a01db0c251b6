"""The end of a training run: a table, a picture, a JSON file."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from train_llama import Run

SMOOTHING = 0.9


def median(values: Sequence[float]) -> float:
    """The median, or NaN of nothing."""
    return statistics.median(values) if values else float("nan")


def smooth(losses: Sequence[float]) -> list[float]:
    """Exponential mean of decay ``SMOOTHING``, without the bias of its start."""
    out, mean = [], 0.0
    for i, loss in enumerate(losses, 1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        out.append(mean / (1 - SMOOTHING**i))
    return out


def show(runs: Sequence[Run], console: Console) -> None:
    """One column a run and, with a baseline, one that compares."""
    rows = [
        ("validation loss, nats a byte", [r.validation for r in runs], "{:.4f}", "gap {:+.4f}"),
        ("first step, with compilation unless cached, s", [r.first_step for r in runs], "{:.1f}", ""),
        ("step after it, median, ms", [1e3 * median(r.seconds) for r in runs], "{:.1f}", "× {:.2f}"),
        ("kept for backward, MB", [r.saved_bytes / 1e6 for r in runs], "{:.2f}", "× {:.2f}"),
        ("optimizer's states, MB", [r.state_bytes / 1e6 for r in runs], "{:.2f}", "× {:.2f}"),
    ]
    table = Table(title="result")
    table.add_column("")
    for run in runs:
        table.add_column(run.name, justify="right")
    if len(runs) == 2:
        table.add_column(f"against {runs[1].name}", justify="right")
    for name, values, form, comparison in rows:
        cells = [form.format(v) for v in values]
        if len(values) == 2:
            a, b = values
            cells.append(comparison.format(a - b if comparison.startswith("gap") else a / b))
        table.add_row(name, *cells)
    console.print(table)


def plot(runs: Sequence[Run], path: Path) -> None:
    """Training losses of all runs, as they were and smoothed, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    for colour, run in zip(itertools.cycle(("tab:orange", "tab:blue", "tab:green", "tab:red")), runs, strict=False):
        axes.plot(run.losses, color=colour, alpha=0.2, linewidth=0.8)
        axes.plot(smooth(run.losses), color=colour, label=f"{run.name} (validation {run.validation:.3f})")
    axes.set(xlabel="step", ylabel="training loss, nats a byte")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def write_json(path: Path, runs: Sequence[Run], described: dict[str, Any]) -> dict[str, Any]:
    """Write and return every figure of the table, the settings, and all losses."""
    result = {
        **described,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "runs": {
            r.name: {
                "validation_loss": r.validation,
                "first_step_s": r.first_step,
                "median_step_s": median(r.seconds),
                "saved_bytes": r.saved_bytes,
                "state_bytes": r.state_bytes,
                "losses": r.losses,
            }
            for r in runs
        },
    }
    if len(runs) == 2:
        a, b = runs
        result["comparison"] = {
            "validation_gap": a.validation - b.validation,
            "step_ratio": median(a.seconds) / median(b.seconds),
            "saved_ratio": a.saved_bytes / b.saved_bytes,
        }
    path.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result
