"""What a product of FP8 operands costs that have a scale a tensor or a row, cast in generated code."""

from __future__ import annotations

from quartet.lowering.cost import Layer
from quartet.lowering.rates.constants import Rates, Time
from quartet.lowering.recipe.types import Recipe
from quartet.lowering.targets.price_parts import Passes, generated_rotations, groups_moved, with_passes


def cast(rates: Rates, recipe: Recipe, layer: Layer, role: str) -> Time | None:
    """``Kernel.price`` of ``cublaslt`` and ``fp8-grouped``."""
    around = [*generated_rotations(recipe, layer, role), *_casts(recipe, layer, role)]
    if not _tokens_stay(recipe):
        around += groups_moved(layer, role)
    if layer.several and role == "dgrad":
        weights = layer.operands(role)[1]
        around.append(("cast", weights) if layer.groups != 0 else ("copy", weights / 2))  # turned: anew, or their codes
    return with_passes(rates, "fp8", layer, role, around)


def _tokens_stay(recipe: Recipe) -> bool:
    """Whether casts read tokens of groups where they lie, as those by one scale do; rows of results are taken out by
    what follows."""
    gemms = filter(None, (recipe.fprop, recipe.dgrad, recipe.wgrad))
    return all(side.spec is None or side.spec.block == "tensor" for gemm in gemms for side in (gemm.a, gemm.b))


def _casts(recipe: Recipe, layer: Layer, role: str) -> Passes:
    """The largest magnitude is a reading of its own before each cast."""
    gemm, other, operands = getattr(recipe, role), recipe.dgrad, layer.operands(role)
    whole = gemm.a.spec is not None and gemm.a.spec.block == "tensor"
    again = (whole and role == "wgrad" and other is not None  # one cast of E writes its transpose too
             and (other.rotation, other.outer) == (gemm.rotation, gemm.outer))
    fresh = operands if role == "fprop" or not whole else () if again else operands[:1]
    for elements in fresh:
        yield "amax", elements
        yield "cast", elements
