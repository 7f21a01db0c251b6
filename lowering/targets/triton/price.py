"""What a product costs whose operands the fused Triton quantisers fold to E4M3 for FP8 tensor cores."""

from __future__ import annotations

from quartet.kernels.cuda.ops import ROTATION, STOCHASTIC
from quartet.lowering.cost import Layer
from quartet.lowering.rates.constants import Rates, Time
from quartet.lowering.recipe.types import Gemm, Recipe
from quartet.lowering.targets.price_parts import Pass, Passes, groups_moved, quantisers, unrotated, with_passes


def folded(rates: Rates, recipe: Recipe, layer: Layer, role: str) -> Time | None:
    """``Kernel.price`` of ``triton-fp8``."""
    return with_passes(rates, "fp8", layer, role, [*_passes(rates, recipe, layer, role), *groups_moved(layer, role)])


def _passes(rates: Rates, recipe: Recipe, layer: Layer, role: str) -> Passes:
    """Hopper's quantisers fold what they write, but for the columns of a gradient; Triton's have a launch for each."""
    a, b = layer.operands(role)
    if role == "fprop":
        for name in ("rows", "fold") if layer.recompute else ("rows",):
            yield from (Pass(name, a, layer.share), Pass(name, b))
        return
    folded = set[str]()
    for name, elements, launches in quantisers(recipe, layer, role):
        made_for = (recipe.dgrad, recipe.wgrad) if name == "both axes" else (getattr(recipe, role),)
        slower = rates.portable.get(name, 1.0)
        if all(map(_by_cuda, made_for)):
            slower, folded = 1.0, folded | rates.portable.keys() & {name}
        yield Pass(name, slower * elements, launches)
    yield Pass("fold", a, float("both axes" not in folded))
    yield Pass("fold", b, float("requantise" not in folded) * (layer.share if role == "wgrad" else 1.0))
    yield from unrotated(recipe, layer, role)


def _by_cuda(gemm: Gemm) -> bool:
    """Whether Hopper's quantisers round as a product's operands are to be."""
    return gemm.specs == (STOCHASTIC, STOCHASTIC) and gemm.rotation is not None and gemm.rotation.n == ROTATION
