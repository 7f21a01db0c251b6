"""What a product of INT8 operands costs; but for rows as they lie, quantisers are generated code, and scaling is."""

from __future__ import annotations

from quartet.lowering.cost import Layer
from quartet.lowering.rates.constants import Rates, Time
from quartet.lowering.recipe.types import Recipe
from quartet.lowering.targets.price_parts import Pass, Passes, generated_rotations, with_passes

ROWS = 0.75  # of "copy": a quantiser with a scale a row, of rows as they lie (docs/performance.md)


def integers(rates: Rates, recipe: Recipe, layer: Layer, role: str) -> Time | None:
    """``Kernel.price`` of ``int-mm``."""
    times = 2 if layer.recompute and role == "fprop" else 1
    around = [*_quantisers(recipe, layer, role), *generated_rotations(recipe, layer, role)]
    around += [Pass("copy", 1.5 * layer.result(role))] * times  # from int32, scaled
    return with_passes(rates, "int8", layer, role, around)


def _quantisers(recipe: Recipe, layer: Layer, role: str) -> Passes:
    """An operand in rows of what it contracts is read for its scale and cast; one that lies the other way is turned."""
    gemm = getattr(recipe, role)
    turned = {"fprop": (False, False), "dgrad": (False, True), "wgrad": (True, True)}[role]
    for operand, elements, other_way in zip((gemm.a, gemm.b), layer.operands(role), turned, strict=True):
        if operand.source != "saved" and operand.spec.block == "row" and not other_way:
            yield Pass("copy", ROWS * elements)
        elif operand.source != "saved":
            yield Pass("amax", elements)
            yield Pass("cast", elements)
        if other_way:
            yield Pass("copy", elements / 2)
