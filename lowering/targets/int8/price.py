"""What a product of INT8 operands costs, whose quantisers and scaling are generated code."""

from __future__ import annotations

from quartet.lowering.cost import Layer
from quartet.lowering.rates.constants import Rates, Time
from quartet.lowering.recipe.types import Recipe
from quartet.lowering.targets.price_parts import Passes, generated_rotations, with_passes


def integers(rates: Rates, recipe: Recipe, layer: Layer, role: str) -> Time | None:
    """``Kernel.price`` of ``int-mm``."""
    times = 2 if layer.recompute and role == "fprop" else 1
    around = [*_quantisers(recipe, layer, role), *generated_rotations(recipe, layer, role)]
    around += [("copy", 1.5 * layer.result(role))] * times  # from int32, scaled
    return with_passes(rates, "int8", layer, role, around)


def _quantisers(recipe: Recipe, layer: Layer, role: str) -> Passes:
    """An operand in rows of what it contracts is read for its scale and cast; one that lies the other way is turned."""
    gemm = getattr(recipe, role)
    turned = {"fprop": (False, False), "dgrad": (False, True), "wgrad": (True, True)}[role]
    for operand, elements, other_way in zip((gemm.a, gemm.b), layer.operands(role), turned, strict=True):
        if operand.source != "saved":
            yield "amax", elements
            yield "cast", elements
        if other_way:
            yield "copy", elements / 2
