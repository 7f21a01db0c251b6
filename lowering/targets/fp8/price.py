"""What a product of FP8 operands costs that have a scale a tensor or a row, cast in generated code."""

from __future__ import annotations

from collections.abc import Iterator

from quartet.lowering.cost import Layer, Size
from quartet.lowering.ir.ops.decompositions import RADICES
from quartet.lowering.rates import Rates
from quartet.lowering.recipe.types import Recipe


def cast(rates: Rates, recipe: Recipe, layer: Layer, role: str) -> Size:
    """``Kernel.price`` of ``cublaslt``."""
    times = 2 if layer.recompute and role == "fprop" else 1
    product = rates.product("fp8", *layer.dims(role))
    passes = (*_rotations(recipe, layer, role), *_casts(recipe, layer, role))
    return times * product + sum(rates.of_pass(name, elements) for name, elements in passes)


def _casts(recipe: Recipe, layer: Layer, role: str) -> Iterator[tuple[str, Size]]:
    """The largest magnitude is a reading of its own before each cast."""
    gemm, other, operands = getattr(recipe, role), recipe.dgrad, layer.operands(role)
    whole = gemm.a.spec is not None and gemm.a.spec.block == "tensor"
    again = (whole and role == "wgrad" and other is not None  # one cast of E writes its transpose too
             and (other.rotation, other.outer) == (gemm.rotation, gemm.outer))
    fresh = operands if role == "fprop" or not whole else () if again else operands[:1]
    for elements in fresh:
        yield "amax", elements
        yield "cast", elements


def _rotations(recipe: Recipe, layer: Layer, role: str) -> Iterator[tuple[str, Size]]:
    """Hadamard transforms in generated code: to fp32, then a loop for each stage, of twice a fused one's traffic."""
    gemm, operands, result = getattr(recipe, role), layer.operands(role), layer.result(role)
    turned = [(gemm.rotation, elements) for elements in operands] + [(gemm.outer, operands[0]), (gemm.outer, result)]
    if gemm.b.source == "saved" and recipe.fprop is not None:
        turned.append((recipe.fprop.rotation, result))
    for rotation, elements in turned:
        if rotation is not None:
            yield from [("unrotate", 2 * elements)] * (1 + len(RADICES[rotation.n]))
