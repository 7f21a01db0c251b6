"""What is kept between forward and backward under a budget: lines of a report, and the frontier as a picture."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from quartet.kernels.files import expanded
from quartet.lowering.recipe.records import MemoryRecord
from quartet.report.text import human_bytes


def memory_lines(records: Sequence[MemoryRecord]) -> Iterator[str]:
    """A line a graph: what is kept of what it keeps unquantised, by which choices, in what time."""
    for r in records:
        if r.lossless and not (r.fits or r.open):
            continue  # nobody has asked, and there was nothing to choose
        parts = [f"{human_bytes(r.saved_bytes)} of {human_bytes(r.unquantised_bytes)} unquantised"
                 f" ({r.saved_bytes / max(r.unquantised_bytes, 1):.3f}) under memory={r.budget}"]
        if not r.fits:
            parts.append("where nothing can be chosen" if not r.open else
                         "which is the least without loss" if r.lossless else "which is the least that can be")
        if r.again:
            parts.append(f"{r.again} × products again")
        if r.weights:
            parts.append(f"{r.weights} weights quantised again")
        if r.encoded:
            parts.append(f"{r.encoded} tensors in fewer bits")
        if r.again or r.weights or r.encoded:
            parts.append("no rates to predict the time" if r.nominal else f"predicted {seconds(r.seconds)} a step")
        if r.slack:
            parts.append(f"the best within {human_bytes(r.slack)} less")
        yield f"memory    {', '.join(parts)}"


def seconds(value: float) -> str:
    """``"1.25 ms"`` or ``"12 µs"``."""
    return f"{1e3 * value:.2f} ms" if value >= 1e-3 else f"{1e6 * value:.0f} µs"


def plot(records: Sequence[MemoryRecord], path: str | os.PathLike[str]) -> None:
    """Draw time against memory, a line a graph, with a mark at the choice; the suffix of ``path`` says the format.

    Raises:
        ValueError: there is no frontier. ImportError: without matplotlib.
    """
    if not records:
        raise ValueError("nothing was chosen, so there is no frontier: explain the model with options={'memory': …}")
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(f"the picture needs matplotlib ({error}): run `pip install matplotlib`") from None
    from matplotlib.figure import Figure  # pyplot would take the place of the user's backend

    figure = Figure(figsize=(8, 4.5), layout="tight")
    axes = figure.subplots()
    for i, r in enumerate(records):
        axes.plot([p.share for p in r.frontier], [1e3 * p.seconds for p in r.frontier], "o-", color=f"C{i}",
                  markersize=3, linewidth=1, label=f"graph {i}, memory={r.budget}")
        axes.plot([r.saved_bytes / max(r.unquantised_bytes, 1)], [1e3 * r.seconds], "*", color=f"C{i}", markersize=12)
    nominal = any(r.nominal for r in records)
    axes.set(xlabel="kept between forward and backward, of what is kept unquantised",
             title="time against memory, predicted",
             ylabel=f"ms a step beyond keeping everything{' on a nominal GPU' if nominal else ''}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    file = expanded(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "quartet"}):  # the same picture is the same file
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
