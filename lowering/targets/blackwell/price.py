"""What a product costs on Blackwell's block-scaled tensor cores, whose operands stay as they are quantised.

Nobody has run these kernels: the products' rates are those of a data sheet, the quantisers' follow from what an H200
takes (docs/performance.md), as multiples of a pass that is among the rates.
"""

from __future__ import annotations

from quartet.lowering.cost import Layer
from quartet.lowering.rates.constants import Rates, Time
from quartet.lowering.recipe.types import Recipe
from quartet.lowering.targets.blackwell.block_scaled import kind_of
from quartet.lowering.targets.price_parts import Pass, Passes, quantisers, unrotated, with_passes

DTYPE = {"mxf4": "fp4", "nvf4": "fp4", "mxf8": "fp8"}
NVFP4_ROWS = {"four_six": 0.95, "eden": 0.85}  # of "rows": those of NVFP4 by that rule, after their largest magnitude
NVFP4_OTHER_ROWS = 0.6  # by any other; columns and both axes take as long as MXFP4's
MXFP8 = 0.8, 1.0  # of "copy": rows, and columns
DOT_SCALED = 2.0  # of a product of ours: one by Triton


def block_scaled(rates: Rates, recipe: Recipe, layer: Layer, role: str) -> Time | None:
    """``Kernel.price`` of ``cutlass`` and, on Blackwell, of ``scaled-mm``."""
    return _price(rates, recipe, layer, role, 1.0)


def dot_scaled(rates: Rates, recipe: Recipe, layer: Layer, role: str) -> Time | None:
    """``Kernel.price`` of ``dot-scaled``."""
    return _price(rates, recipe, layer, role, DOT_SCALED)


def _price(rates: Rates, recipe: Recipe, layer: Layer, role: str, slower: float) -> Time | None:
    kind = kind_of(getattr(recipe, role).a.spec)
    if kind is None:  # FP8 with fp32 scales of blocks, on Hopper
        return None
    return with_passes(rates, DTYPE[kind], layer, role, _passes(recipe, layer, role, kind), slower)


def _passes(recipe: Recipe, layer: Layer, role: str, kind: str) -> Passes:
    a, b = layer.operands(role)
    if kind == "mxf8":
        rows, columns = MXFP8
        across = {"fprop": (rows, rows), "dgrad": (rows, columns), "wgrad": (columns, columns)}[role]
        yield from (Pass("copy", times * elements) for times, elements in zip(across, (a, b), strict=True))
        return
    rule = getattr(recipe, role).a.spec.rule
    made = [Pass("rows", a, layer.share), Pass("rows", b)] if role == "fprop" else list(quantisers(recipe, layer, role))
    for name, elements, launches in made:
        if kind == "nvf4":
            yield Pass("amax", elements, launches)
        as_rows = kind == "nvf4" and name == "rows"
        yield Pass(name, elements * (NVFP4_ROWS.get(rule, NVFP4_OTHER_ROWS) if as_rows else 1.0), launches)
    if role != "fprop":
        yield from unrotated(recipe, layer, role)
