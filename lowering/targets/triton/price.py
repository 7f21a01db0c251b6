"""What a product costs whose operands the fused Triton quantisers fold to E4M3 for FP8 tensor cores."""

from __future__ import annotations

from collections.abc import Iterator

from quartet.lowering.cost import Layer, Size
from quartet.lowering.rates import Rates
from quartet.lowering.recipe.types import Recipe


def folded(rates: Rates, recipe: Recipe, layer: Layer, role: str) -> Size:
    """``Kernel.price`` of ``triton-fp8``."""
    times = 2 if layer.recompute and role == "fprop" else 1
    product = rates.product("fp8", *layer.dims(role))
    return times * product + sum(rates.of_pass(name, elements) for name, elements in _passes(recipe, layer, role))


def _passes(recipe: Recipe, layer: Layer, role: str) -> Iterator[tuple[str, Size]]:
    gemm, (a, b) = getattr(recipe, role), layer.operands(role)
    if role == "fprop":
        yield from (("rows", elements) for elements in (a, b))
        if layer.recompute:
            yield from (("fold", elements) for elements in (a, b))
        return
    saved = gemm.b.source == "saved"
    if recipe.dgrad is None or recipe.wgrad is None:
        yield "one axis", a
    elif role == "dgrad":
        yield "both axes", a
    yield "fold", a
    yield "requantise" if saved else "one axis", b
    yield "fold", b
    if saved and recipe.fprop is not None and recipe.fprop.rotation is not None:
        yield "unrotate", layer.result(role)
