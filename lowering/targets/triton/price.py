"""What a product costs whose operands the fused Triton quantisers fold to E4M3 for FP8 tensor cores."""

from __future__ import annotations

from quartet.kernels.cuda.ops import ROTATION, STOCHASTIC
from quartet.lowering.cost import Layer
from quartet.lowering.rates.constants import Rates, Time
from quartet.lowering.recipe.types import Gemm, Recipe
from quartet.lowering.targets.price_parts import Passes, groups_moved, quantisers, unrotated, with_passes


def folded(rates: Rates, recipe: Recipe, layer: Layer, role: str) -> Time | None:
    """``Kernel.price`` of ``triton-fp8``."""
    return with_passes(rates, "fp8", layer, role, [*_passes(rates, recipe, layer, role), *groups_moved(layer, role)])


def _passes(rates: Rates, recipe: Recipe, layer: Layer, role: str) -> Passes:
    if role == "fprop":
        yield from (("rows", elements) for elements in layer.operands(role))
        if layer.recompute:
            yield from (("fold", elements) for elements in layer.operands(role))
        return
    a, b = layer.operands(role)
    for name, elements in quantisers(recipe, layer, role):
        made_for = (recipe.dgrad, recipe.wgrad) if name == "both axes" else (getattr(recipe, role),)
        yield name, elements * (1.0 if all(map(_by_cuda, made_for)) else rates.portable.get(name, 1.0))
    yield "fold", a
    yield "fold", b
    yield from unrotated(recipe, layer, role)


def _by_cuda(gemm: Gemm) -> bool:
    """Whether Hopper's quantisers round as a product's operands are to be."""
    return gemm.specs == (STOCHASTIC, STOCHASTIC) and gemm.rotation is not None and gemm.rotation.n == ROTATION
