"""What a product costs whose operands the fused Triton quantisers fold to E4M3 for FP8 tensor cores."""

from __future__ import annotations

from quartet.lowering.cost import Layer
from quartet.lowering.rates.constants import Rates, Time
from quartet.lowering.recipe.types import Recipe
from quartet.lowering.targets.price_parts import Passes, groups_moved, quantisers, unrotated, with_passes


def folded(rates: Rates, recipe: Recipe, layer: Layer, role: str) -> Time | None:
    """``Kernel.price`` of ``triton-fp8``."""
    return with_passes(rates, "fp8", layer, role, [*_passes(recipe, layer, role), *groups_moved(layer, role)])


def _passes(recipe: Recipe, layer: Layer, role: str) -> Passes:
    if role == "fprop":
        yield from (("rows", elements) for elements in layer.operands(role))
        if layer.recompute:
            yield from (("fold", elements) for elements in layer.operands(role))
        return
    a, b = layer.operands(role)
    yield from quantisers(recipe, layer, role)
    yield "fold", a
    yield "fold", b
    yield from unrotated(recipe, layer, role)
