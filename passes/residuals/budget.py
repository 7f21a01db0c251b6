"""How much may be kept between forward and backward: the option ``memory``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

UNITS = {"": 1, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
WORDS = ("least", "fastest", "recipe")


class BudgetError(ValueError):
    """A model needs more memory than it may have, under ``strict=True``."""


@dataclass(frozen=True)
class Budget:
    """What is kept may take so much, and is chosen to cost the least time.

    Args:
        kind: ``"share"`` of what the same graph keeps unquantised; ``"peak"``, a share of that and of what is ``held``
            beside it; ``"bytes"`` of one graph; ``"least"`` and ``"fastest"`` without a number; ``"recipe"``: nothing
            is chosen, recipes and rules say all.
        amount: of a share or of bytes.
        held: bytes that a step holds while it keeps the most, whatever is chosen.
        lossless: choose among what changes no number, and make nothing slower than the recipe says.
    """

    kind: str
    amount: float = 0.0
    held: int = 0
    lossless: bool = False

    def limit(self, plain: int) -> int | None:
        """Bytes for a graph that keeps ``plain`` unquantised; None where there is no limit, 0 for the fewest."""
        if self.kind in ("share", "peak"):
            return max(0, int(self.amount * (plain + self.held)) - self.held)
        return {"bytes": int(self.amount), "least": 0}.get(self.kind)

    def __str__(self) -> str:
        if self.kind == "share":
            return f"{self.amount:g} of the unquantised bytes"
        if self.kind == "peak":
            return f"{self.amount:g} of the unquantised peak with {self.held / 2**30:.2f} GiB beside it"
        return _readable(self.amount) if self.kind == "bytes" else f"{self.kind!r}"

    @classmethod
    def parse(cls, value: Any) -> Budget:
        """What a user gives: 0.7, ``"0.7"``, ``"70%"``, ``"12GiB"``, ``"least"``, ``"fastest"`` or ``"recipe"``.

        Units are of either case: ``"12gib"`` are 12 · 2³⁰ bytes, ``"1KB"`` are 1000.

        Raises:
            ValueError: anything else; the message says what is possible.
        """
        legal = ("a share of what is kept unquantised, such as 0.7, bytes with their unit, such as '12GiB', 'least', "
                 "'fastest' or 'recipe'")
        text = value.strip() if isinstance(value, str) else value
        if text in WORDS:
            return cls(text)
        if isinstance(text, bool) or not isinstance(text, int | float | str):
            raise ValueError(f"{legal}, not {type(value).__name__} {value!r}")
        found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(%|([kmgt]i?|)b)?", f"{text}", re.IGNORECASE)
        if found is None:
            raise ValueError(f"{legal}, not {value!r}")
        number, unit = float(found[1]), found[2]
        if unit and unit != "%":
            size = number * UNITS[found[3].lower()]
            if size < 1:
                raise ValueError(f"{legal}; {value!r} is less than a byte: the fewest that can be are 'least'")
            return cls("bytes", size)
        share = number / 100 if unit else number
        if share == 0:
            raise ValueError(f"{legal}; {value!r} is no share from 0 to 1: the fewest bytes that can be are 'least'")
        if share > 1:
            meant = _readable(number if number >= 2**10 else number * 2**30).replace(" ", "")
            hint = "" if unit else f", and bytes need a unit: {meant!r}"
            raise ValueError(f"{legal}; {value!r} is no share from 0 to 1{hint}")
        return cls("share", share)


def _readable(size: float) -> str:
    """Bytes in the largest unit that they fill: ``"100 B"``, ``"1.5 GiB"``."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size >= UNITS[unit[:-1].lower()]:
            return f"{size / UNITS[unit[:-1].lower()]:g} {unit}"
    return f"{size:g} B"


def default(parameters: int, trained: int) -> Budget:
    """0.8 of the unquantised peak without loss, for so many bytes of parameters, those that are trained among them.

    When backward begins all of them are there, and Adam's two moments of the trained ones in their dtype, but no
    gradients yet.
    """
    return Budget("peak", 0.8, held=parameters + 2 * trained, lossless=True)
