"""What has been recorded, by step and by layer: as a table, as files, and where something jumped."""

from __future__ import annotations

import json
import math
import operator
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from statistics import median
from typing import Any, SupportsIndex

from quartet.inspect.heat_map import page_of
from quartet.inspect.records import Record, fetched, product_errors
from quartet.inspect.tensorboard import write
from quartet.kernels.files import expanded, write_text
from quartet.nearest import did_you_mean
from quartet.report.text import shorten
from quartet.runtime.inspect.recorder import Row

SHOWN = ("amax", "rms", "underflow", "clipped", "error", "SNR", "unfolded", "cosine")
_WIDEST = 48


@dataclass(frozen=True)
class Spike:
    """A value far above what it was in the steps before.

    Args:
        step: in which.
        name: whose.
        column: of the table.
        value: what it is there.
        usual: the median before.
    """

    step: int
    name: str
    column: str
    value: float
    usual: float

    def __str__(self) -> str:
        return f"step {self.step}: {self.column} of {self.name} is {self.value:.4g}, usually {self.usual:.4g}"


class Statistics(Sequence[Record]):
    """Records in the order in which they were made."""

    def __init__(self, records: Iterable[Record]) -> None:
        self._records = tuple(records)

    @staticmethod
    def of(rows: Iterable[Row]) -> Statistics:
        """From rows of a recorder."""
        return Statistics(fetched(rows))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        found = self._records[index]
        return Statistics(found) if isinstance(index, slice) else found

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(sorted({record.step for record in self}))

    def where(self, **wanted: Any) -> Statistics:
        """Those whose fields have these values: ``where(kind="operand", layer="layers.0.up", step=100)``.

        Raises:
            ValueError: no such field.
        """
        legal = [f.name for f in fields(Record)]
        for key in wanted:
            if key not in (*legal, "snr", "name"):
                raise ValueError(f"no field {key!r} of a record; {did_you_mean(key, legal)}"
                                 f"possible: {', '.join(legal)}")
        return Statistics(r for r in self if all(getattr(r, key) == value for key, value in wanted.items()))

    def latest(self) -> Statistics:
        """Of each thing the last record."""
        return Statistics({(r.kind, r.name): r for r in self}.values())

    def table(self, step: int | None = None, by: str | None = None, limit: int | None = None) -> str:
        """Operands and gradients of one step, the last unless given, as text.

        Args:
            by: a column, worst first; in the order of the graph unless given. limit: how many rows, at least 0.

        Raises:
            ValueError: no such column, or a limit that is not possible.
        """
        if limit is not None and not (isinstance(limit, SupportsIndex) and operator.index(limit) >= 0):
            raise ValueError(f"limit is a number of rows, 0 or more, not {limit!r}")
        found = (self.latest() if step is None else self.where(step=step)).where_kind("operand", "product")
        if by is not None:
            if by not in SHOWN:
                raise ValueError(f"no column {by!r}; possible: {', '.join(SHOWN)}")
            sign = 1 if by in ("SNR", "cosine") else -1
            found = Statistics(sorted(found, key=lambda r: (math.isnan(_value(r, by)), sign * _value(r, by))))
        rows = [(shorten(r.name, _WIDEST), *(_cell(column, _value(r, column)) for column in SHOWN))
                for r in found[:limit]]
        return aligned(("operand or gradient", *SHOWN), rows) if rows else "nothing recorded yet"

    def where_kind(self, *kinds: str) -> Statistics:
        return Statistics(record for record in self if record.kind in kinds)

    def what_if(self) -> str:
        """The relative error of each product under each recipe, √(error of a + error of b), on average over steps."""
        errors = product_errors(self)
        recipes = list(dict.fromkeys(recipe for _, _, recipe in errors))
        places = list(dict.fromkeys((layer, role) for layer, role, _ in errors))
        rows = [(shorten(f"{layer} {role}", _WIDEST), *(
            f"{errors[layer, role, recipe]:.2%}" if (layer, role, recipe) in errors else "" for recipe in recipes))
            for layer, role in places]
        return aligned(("product", *recipes), rows) if rows else "nothing recorded yet: Inspector(what_if=[…])"

    def spikes(self, factor: float = 4.0, history: int = 16) -> list[Spike]:
        """Where the largest magnitude or the error of an operand, the error of a gradient or the alignment of weights
        exceeds ``factor`` times the median of what it was in up to ``history`` recorded steps before, of at least 4.
        The loss exceeds its median by ``factor`` times 1.48 of the median distance from that, a standard deviation.

        Raises:
            ValueError: a factor that is not above 0, or fewer than 4 steps of history.
        """
        if not factor > 0 or not history >= 4:
            raise ValueError(f"factor is above 0 and history 4 steps or more, not {factor!r} and {history!r}")
        found = []
        series: dict[tuple[str, str], list[tuple[int, float]]] = {}
        for record in self:
            for column in {"operand": ("amax", "error"), "product": ("error",), "loss": ("loss",),
                           "alignment": ("largest",)}.get(record.kind, ()):
                series.setdefault((record.name, column), []).append((record.step, record.values[column]))
        for (name, column), values in series.items():
            for i in range(4, len(values)):
                before = [value for _, value in values[max(0, i - history):i]]
                usual, (step, value) = median(before), values[i]
                spread = median(abs(v - usual) for v in before)
                limit = usual + 1.4826 * factor * spread if column == "loss" else usual * factor
                if value > limit or math.isnan(value) and not math.isnan(usual):
                    found.append(Spike(step, name, column, value, usual))
        return sorted(found, key=lambda spike: spike.step)

    def to_jsonl(self, path: str | os.PathLike[str]) -> None:
        """Write a line of JSON a record."""
        write_text(expanded(path), "".join(json.dumps(record.as_dict()) + "\n" for record in self))

    def to_html(self, path: str | os.PathLike[str], column: str = "error") -> None:
        """Write a page with a heat map of a column, layers × steps; see :func:`quartet.inspect.heat_map.page_of`."""
        write_text(expanded(path), page_of(self, column))

    def to_tensorboard(self, writer: Any) -> None:
        """Add scalars, and histograms of the scales, to a ``SummaryWriter`` or to a new one in a folder."""
        write(self, writer)

    def __str__(self) -> str:
        return self.table()


def _value(record: Record, column: str) -> float:
    return record.snr if column == "SNR" else record.values.get(column, math.nan)


def _cell(column: str, value: float) -> str:
    if math.isnan(value):
        return ""
    if column in ("underflow", "clipped", "error", "unfolded"):
        return f"{value:.2%}"
    return f"{value:.1f} dB" if column == "SNR" else f"{value:.4f}" if column == "cosine" else f"{value:.3g}"


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, the first to the left."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                               for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
                     for row in (header, *rows))
