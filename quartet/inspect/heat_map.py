"""A page with a heat map: operands and gradients down, steps across, one column of the statistics as colour."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from quartet.inspect.records import COLUMNS_OF, Record
from quartet.report import pages

_LOGARITHMIC = ("amax", "rms", "error", "underflow", "clipped", "zeros", "not_finite", "unfolded")
_LABELS = 12  # steps that are written out
_LOW, _HIGH = (237, 244, 250), (176, 24, 60)


@dataclass(frozen=True)
class _Colours:
    """Values between two ends, or their logarithms, as colours."""

    low: float
    high: float
    logarithmic: bool

    @staticmethod
    def of(values: Iterable[float], logarithmic: bool) -> _Colours:
        held = [value for value in values if math.isfinite(value) and not (logarithmic and value <= 0)]
        return _Colours(min(held, default=1.0), max(held, default=1.0), logarithmic)

    def __call__(self, value: float) -> str | None:
        """None for what is not finite."""
        if not math.isfinite(value):
            return None
        at, low, high = (math.log(max(v, self.low)) if self.logarithmic else v for v in (value, self.low, self.high))
        share = min(max((at - low) / (high - low), 0.0), 1.0) if high > low else 0.0
        mixed = (a + (b - a) * share for a, b in zip(_LOW, _HIGH, strict=True))
        return "#" + "".join(f"{round(part):02x}" for part in mixed)

    def __str__(self) -> str:
        return f"from {self.low:.3g} (pale) to {self.high:.3g} (dark){', logarithmic' if self.logarithmic else ''}"


def page_of(records: Iterable[Record], column: str = "error") -> str:
    """A self-contained HTML page.

    Args:
        column: of operands and gradients, ``"error"``, ``"underflow"``, ``"clipped"``, ``"amax"``, ``"cosine"`` …

    Raises:
        ValueError: no such column.
    """
    columns = tuple(dict.fromkeys((*COLUMNS_OF["operand"], *COLUMNS_OF["product"])))
    if column not in columns:
        raise ValueError(f"no column {column!r} of operands or gradients; possible: {', '.join(columns)}")
    values: dict[str, dict[int, float]] = {}
    for record in records:
        if record.kind in ("operand", "product") and not math.isnan(record.values.get(column, math.nan)):
            values.setdefault(record.name, {})[record.step] = record.values[column]
    steps = sorted({step for row in values.values() for step in row})
    colours = _Colours.of((value for row in values.values() for value in row.values()), column in _LOGARITHMIC)
    rows = [{"name": name, "cells": [_cell(name, step, row.get(step), colours) for step in steps]}
            for name, row in values.items()]
    every = max(1, -(-len(steps) // _LABELS))
    labels = [str(step) if i % every == 0 else "" for i, step in enumerate(steps)]
    return pages.render("heat_map.html", title=f"quartet: {column} by step", steps=labels, rows=rows,
                        subtitle=f"{colours}; striped: not finite")


def _cell(name: str, step: int, value: float | None, colours: _Colours) -> dict[str, Any] | None:
    return None if value is None else {"title": f"{name}, step {step}: {value:.4g}", "color": colours(value)}
