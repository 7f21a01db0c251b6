"""Which layer of a stack a module belongs to, by its name: ``layers.3.mlp.up`` is in the fourth of ``layers``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from quartet.lowering.recipe.depth import Layer


def layers_of(names: Iterable[str]) -> Mapping[str, Layer]:
    """Module name → its layer, for names with a number in them; the first number counts.

    How many layers a stack has follows from the largest number among ``names``. A stack of which they show one layer
    only is left out: the graph of a block that is compiled by itself serves all layers and does not tell which.
    """
    placed = {name: found for name in names if (found := _place(name)) is not None}
    seen: dict[str, set[int]] = {}
    for stack, index in placed.values():
        seen.setdefault(stack, set()).add(index)
    return {name: (index, max(seen[stack]) + 1) for name, (stack, index) in placed.items() if len(seen[stack]) > 1}


def _place(name: str) -> tuple[str, int] | None:
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return None if number is None else (".".join(parts[:number]), int(parts[number]))
