"""What was recorded, on the host: a value of each thing in each step."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from quartet.kernels.reference.statistics import BINS, COLUMNS, LOWEST
from quartet.runtime.inspect.recorder import Row

COLUMNS_OF: Mapping[str, tuple[str, ...]] = {
    "operand": COLUMNS, "product": ("cosine", "error"), "what-if": ("error",), "alignment": ("mean", "largest"),
    "loss": ("loss",)}
_NAME = re.compile(r"(?P<layer>.*) (?P<role>fprop|dgrad|wgrad)(?: (?P<operand>[xwe])(?: (?P<recipe>.*))?)?")
Errors = dict[tuple[str, str, str], float]  # (layer, role, recipe)


@dataclass(frozen=True)
class Record:
    """What was recorded of one thing in one step.

    Args:
        step: of training.
        kind: ``"operand"``: of a quantised product; ``"product"``: a gradient beside that of the unquantised operands,
            in part of it; ``"what-if"``: an operand under another recipe; ``"alignment"``: of the weights of a gated
            layer; ``"loss"``.
        layer: what it is of; this and the next three are empty where they do not apply.
        role: of the product.
        operand: of the product.
        recipe: that quantises.
        values: name → value. Shares are between 0 and 1, ``error`` is Σ(q − x)² / Σx², and 1 − cosine is small.
        scales: k → how many scales are in [2^k, 2^(k+1)), of an operand.
    """

    step: int
    kind: str
    layer: str
    role: str = ""
    operand: str = ""
    recipe: str = ""
    values: dict[str, float] = field(default_factory=dict)
    scales: Mapping[int, int] = field(default_factory=dict)

    @property
    def snr(self) -> float:
        """−10 log₁₀ of the error, in dB; infinite of what is exact."""
        error = self.values.get("error", math.nan)
        return math.inf if error == 0 else -10 * math.log10(error) if error > 0 else math.nan

    @property
    def name(self) -> str:
        """All that it is of, in a line."""
        return " ".join(filter(None, (self.layer, self.role, self.operand, self.recipe)))

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with the SNR in dB, without what is empty or NaN; an infinity is text."""
        named = {key: getattr(self, key) for key in ("step", "kind", "layer", "role", "operand", "recipe")}
        known = {key: value if math.isfinite(value) else str(value)
                 for key, value in (self.values | {"snr": self.snr}).items() if not math.isnan(value)}
        return {key: value for key, value in named.items() if value != ""} | known | (
            {"scales": {str(k): n for k, n in self.scales.items()}} if self.scales else {})


def fetched(rows: Iterable[Row]) -> Iterator[Record]:
    """The records of rows that are on the host."""
    for row in rows:
        yield from _records(row, row.values.tolist())


def _records(row: Row, values: list[float]) -> Iterator[Record]:
    columns = COLUMNS_OF[row.kind]
    scales = {LOWEST + k: int(n) for k, n in enumerate(values[len(columns):]) if n}
    assert len(values) in (len(columns), len(columns) + BINS)
    for name in row.names:
        found = _NAME.fullmatch(name) if row.kind in ("operand", "product", "what-if") else None
        of = {"layer": name} if found is None else {key: text or "" for key, text in found.groupdict().items()}
        yield Record(row.step, row.kind, **of, values=dict(zip(columns, values, strict=False)), scales=scales)


def product_errors(records: Iterable[Record]) -> Errors:
    """Relative error ``√(e_a + e_b)`` of each product A·Bᵀ under each recipe, root mean square over the steps.

    ``e`` is Σ(q − x)² / Σx² of an operand. Errors of two operands that are independent of each other and of the values
    add up so, to first order, if neither operand has a direction of its own.
    """
    sums: dict[tuple[str, str, str], list[float]] = {}
    steps: dict[tuple[str, str, str], set[int]] = {}
    for record in records:
        if record.kind != "what-if":
            continue
        key = record.layer, record.role, record.recipe
        sums.setdefault(key, []).append(record.values["error"])
        steps.setdefault(key, set()).add(record.step)
    return {key: math.sqrt(math.fsum(errors) / len(steps[key])) for key, errors in sums.items()}
