"""What a product of FP8 operands costs that have a scale a tensor or a row, cast in generated code."""

from __future__ import annotations

from quartet.kernels.spec import QuantSpec
from quartet.lowering.cost import Layer
from quartet.lowering.rates.constants import Rates, Time
from quartet.lowering.recipe.types import Recipe
from quartet.lowering.targets.fp8.casts import FEW_ROWS
from quartet.lowering.targets.fp8.together import TOGETHER
from quartet.lowering.targets.price_parts import Pass, Passes, generated_rotations, groups_moved, with_passes


def cast(rates: Rates, recipe: Recipe, layer: Layer, role: str) -> Time | None:
    """``Kernel.price`` of ``cublaslt`` and ``fp8-grouped``."""
    around = [*generated_rotations(recipe, layer, role), *_casts(recipe, layer, role)]
    if not _tokens_stay(recipe):
        around += groups_moved(layer, role)
    if layer.several and role == "dgrad":
        weights = layer.operands(role)[1]
        turned = Pass("cast", weights) if layer.groups != 0 else Pass("copy", weights / 2)  # anew, or their codes
        around.append(turned)
    return with_passes(rates, "fp8", layer, role, around)


def _tokens_stay(recipe: Recipe) -> bool:
    """Whether casts read tokens of groups where they lie, as those by one scale do; rows of results are taken out by
    what follows."""
    gemms = filter(None, (recipe.fprop, recipe.dgrad, recipe.wgrad))
    return all(side.spec is None or side.spec.block == "tensor" for gemm in gemms for side in (gemm.a, gemm.b))


def _casts(recipe: Recipe, layer: Layer, role: str) -> Passes:
    """The largest magnitude is a reading of its own before each cast.

    With one scale a tensor what is launched is the cast, and before it the scale of weights and of many rows:
    magnitudes are found by the kernel that makes the tensor, weights go by eight, and gradients that meet one X
    together. Under ``delayed`` one that reads the history and one that clears come before the cast.
    """
    gemm, other, operands = getattr(recipe, role), recipe.dgrad, layer.operands(role)
    whole = gemm.a.spec is not None and gemm.a.spec.block == "tensor"
    again = (whole and role == "wgrad" and other is not None  # one cast of E writes its transpose too
             and (other.rotation, other.outer) == (gemm.rotation, gemm.outer))
    fresh = operands if role == "fprop" or not whole else () if again else operands[:1]
    for i, (elements, shared) in enumerate(zip(fresh, _shares(layer, role, whole), strict=False)):
        yield Pass("amax", elements, _scales(layer, gemm.a.spec, role == "fprop" and i == 1) * shared)
        yield Pass("cast", elements, shared)


def _scales(layer: Layer, spec: QuantSpec | None, weight: bool) -> float:
    """Launches for a scale."""
    if spec is None or spec.block != "tensor":
        return 1.0
    if spec.rule == "delayed":
        return 2.0
    few = isinstance(layer.m, int) and layer.m <= FEW_ROWS and not (weight or layer.several)
    return 0.0 if few else 1.0


def _shares(layer: Layer, role: str, whole: bool) -> tuple[float, float]:
    """Of a launch for A, and of one for B."""
    e, w = (layer.share, 1 / TOGETHER) if whole and not layer.several else (1.0, 1.0)
    return {"fprop": (layer.share, w), "dgrad": (e, w), "wgrad": (e, layer.share)}[role]
