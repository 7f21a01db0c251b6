"""A page with a heat map: operands and gradients down, steps across, one column of the statistics as colour."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable
from dataclasses import dataclass

from quartet.inspect.records import COLUMNS_OF, Record
from quartet.report.html import page

_LOGARITHMIC = ("amax", "rms", "error", "underflow", "clipped", "zeros", "not_finite", "unfolded")
_LOW, _HIGH = (237, 244, 250), (176, 24, 60)
_STYLE = """<style>.heat{overflow-x:auto}.heat table{border-collapse:collapse;font-size:12px}
.heat th{font-weight:400;text-align:left;padding:1px 8px 1px 0;white-space:nowrap;position:sticky;left:0;
background:Canvas;color:CanvasText}.heat td{min-width:9px;height:15px;padding:0;border:1px solid Canvas}
.heat td.bad{background:repeating-linear-gradient(45deg,#000 0 3px,#fd0 3px 6px)}
.heat .steps td{font-size:10px;color:GrayText;background:none;padding-right:3px}</style>"""


@dataclass(frozen=True)
class _Colours:
    """Values between two ends, or their logarithms, as colours."""

    low: float
    high: float
    logarithmic: bool

    def of(self, value: float) -> str:
        at, low, high = (math.log(max(v, self.low)) if self.logarithmic else v for v in (value, self.low, self.high))
        share = (at - low) / (high - low) if high > low else 0.0
        mixed = (a + (b - a) * min(max(share, 0.0), 1.0) for a, b in zip(_LOW, _HIGH, strict=True))
        return "#" + "".join(f"{round(part):02x}" for part in mixed)


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
        if record.kind in ("operand", "product") and column in record.values:
            values.setdefault(record.name, {})[record.step] = record.values[column]
    steps = sorted({step for row in values.values() for step in row})
    held = [v for row in values.values() for v in row.values() if math.isfinite(v)]
    logarithmic = column in _LOGARITHMIC
    positive = [v for v in held if v > 0]
    low, high = (min(positive, default=1.0), max(positive, default=1.0)) if logarithmic else (
        min(held, default=0.0), max(held, default=1.0))
    colours = _Colours(low, high, logarithmic)
    rows = "\n".join(f"<tr><th>{html.escape(name)}</th>{_cells(name, row, steps, colours)}</tr>"
                     for name, row in values.items() if any(not math.isnan(v) for v in row.values()))
    head = "".join(f"<td>{step}</td>" for step in steps)
    scale = f"from {low:.3g} (pale) to {high:.3g} (dark){', logarithmic' if logarithmic else ''}; striped: not finite"
    return page(f"quartet: {column} by step", f'{_STYLE}<p>{html.escape(scale)}</p><div class="heat"><table>'
                f'<tr class="steps"><th>step</th>{head}</tr>\n{rows}\n</table></div>')


def _cells(name: str, row: dict[int, float], steps: list[int], colours: _Colours) -> str:
    return "".join(_cell(name, step, row.get(step), colours) for step in steps)


def _cell(name: str, step: int, value: float | None, colours: _Colours) -> str:
    if value is None:
        return "<td></td>"
    title = html.escape(f"{name}, step {step}: {value:.4g}", quote=True)
    if not math.isfinite(value):
        return f'<td class="bad" title="{title}"></td>'
    return f'<td style="background:{colours.of(value)}" title="{title}"></td>'
