"""The end of a training run: a table, a picture, a JSON file."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from console import Console, Table
from output import INSTALL, whole, write_json

if TYPE_CHECKING:
    from train_llama import Run

SMOOTHING = 0.9
AGAIN = " #"  # in the name of a run that repeats the first with other roundings
NO_PLOT = f"matplotlib is not installed, so there is no picture of the losses: `{INSTALL}` brings it"


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
        ("validation loss, nats a byte", [r.validation for r in runs], "{:.4f}", "gap"),
        ("first step, with compilation unless cached, s", [r.first_step for r in runs], "{:.1f}", ""),
        ("step after it, median, ms", [1e3 * median(r.seconds) for r in runs], "{:.1f}", "× {:.2f}"),
        ("kept for backward, MB", [r.saved_bytes / 1e6 for r in runs], "{:.2f}", "× {:.2f}"),
        ("optimizer's states, MB", [r.state_bytes / 1e6 for r in runs], "{:.2f}", "× {:.2f}"),
    ]
    gap = gap_spread(runs)
    runs = [run for run in runs if AGAIN not in run.name]
    rows = [(name, values[:len(runs)], form, comparison) for name, values, form, comparison in rows]
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
            cells.append(gap if comparison.startswith("gap") else comparison.format(a / b))
        table.add_row(name, *cells)
    console.print(table)


def gaps(runs: Sequence[Run]) -> list[float]:
    """How much higher the validation loss of the first run is than that of the second, and of those that repeat it."""
    if len(runs) < 2:
        return []
    return [run.validation - runs[1].validation for run in (runs[0], *(r for r in runs if AGAIN in r.name))]


def gap_spread(runs: Sequence[Run]) -> str:
    """The gap, or the mean of several with the least and the largest."""
    found = gaps(runs)
    if len(found) < 2:
        return "".join(f"gap {gap:+.4f}" for gap in found)
    return (f"gap {statistics.mean(found):+.4f}, {len(found)} roundings from {min(found):+.4f} to {max(found):+.4f}")


def pyplot() -> Any:
    """matplotlib's, for files alone; None where it is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return None
    return plt


def plot(runs: Sequence[Run], path: Path) -> None:
    """Training losses of all runs, as they were and smoothed, as a PNG; nothing without matplotlib."""
    plt = pyplot()
    if plt is None:
        return
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    for colour, run in zip(itertools.cycle(("tab:orange", "tab:blue", "tab:green", "tab:red")), runs, strict=False):
        axes.plot(run.losses, color=colour, alpha=0.2, linewidth=0.8)
        axes.plot(smooth(run.losses), color=colour, label=f"{run.name} (validation {run.validation:.3f})")
    axes.set(xlabel="step", ylabel="training loss, nats a byte")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    with whole(path) as partial:
        figure.savefig(partial)
    plt.close(figure)


def save(path: Path, runs: Sequence[Run], described: dict[str, Any]) -> dict[str, Any]:
    """Write and return every figure of the table, the settings, and all losses; None for what is not measured yet."""
    result = {
        **described,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "runs": {
            r.name: {
                "validation_loss": _known(r.validation),
                "first_step_s": _known(r.first_step),
                "median_step_s": _known(median(r.seconds)),
                "saved_bytes": r.saved_bytes,
                "state_bytes": r.state_bytes,
                "losses": r.losses,
            }
            for r in runs
        },
    }
    if len(runs) > 1 and all(_known(r.validation) is not None for r in runs):
        (a, b), known = runs[:2], gaps(runs)
        result["comparison"] = {
            "validation_gap": statistics.mean(known),
            "validation_gaps": known,
            "step_ratio": median(a.seconds) / median(b.seconds),
            "saved_ratio": a.saved_bytes / b.saved_bytes,
        }
    write_json(path, result)
    return result


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
