"""Passes around products that several families of kernels have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from quartet.lowering.cost import Layer, Size
from quartet.lowering.ir.ops.decompositions import RADICES
from quartet.lowering.rates.constants import Rates, Time
from quartet.lowering.recipe.types import Recipe


class Pass(NamedTuple):
    """Elements that a rate is of, and how many of the pass's launches are this layer's: one for three layers that read
    the same X is a third of each's; what the kernel before it does as well takes none."""

    rate: str
    elements: Size
    launches: float = 1.0


Passes = Iterator[Pass]


def with_passes(rates: Rates, dtype: str, layer: Layer, role: str, passes: Iterable[Pass],
                slower: float = 1.0) -> Time | None:
    """A product of operands of a dtype, run again where backward needs it, with passes around it; None without rates
    of the dtype. ``slower``: times the device's time of the product."""
    product = layer.product(rates, dtype, role)
    if product is None:
        return None
    times = 2 if layer.recompute and role == "fprop" else 1
    return sum((rates.of_pass(*each) for each in passes),
               Time(times * slower * product.device, times * product.launches))


def quantisers(recipe: Recipe, layer: Layer, role: str) -> Passes:
    """Fused quantisers of a backward product: of E along both axes at once where both products quantise it."""
    gemm, (a, b) = getattr(recipe, role), layer.operands(role)
    if recipe.dgrad is None or recipe.wgrad is None:
        yield Pass("one axis", a)
    elif role == "dgrad":
        yield Pass("both axes", a)
    yield Pass("requantise" if gemm.b.source == "saved" else "one axis", b, layer.share if role == "wgrad" else 1.0)


def unrotated(recipe: Recipe, layer: Layer, role: str) -> Passes:
    """What takes a gradient out of the basis of the codes that forward saved: once for all of one X where they are
    surely added up before (``Layer.summed``), else each by itself."""
    saved = getattr(recipe, role).b.source == "saved"
    if saved and recipe.fprop is not None and recipe.fprop.rotation is not None:
        together = layer.sharing if role == "dgrad" and layer.summed else 1
        yield Pass("unrotate", layer.result(role) / together, 1 / together)


def generated_rotations(recipe: Recipe, layer: Layer, role: str) -> Passes:
    """Hadamard transforms in generated code: to fp32, then a loop for each stage, of twice a fused one's traffic."""
    gemm, operands, result = getattr(recipe, role), layer.operands(role), layer.result(role)
    turned = [(gemm.rotation, elements) for elements in operands] + [(gemm.outer, operands[0]), (gemm.outer, result)]
    if gemm.b.source == "saved" and recipe.fprop is not None:
        turned.append((recipe.fprop.rotation, result))
    for rotation, elements in turned:
        if rotation is not None:
            yield from [Pass("unrotate", 2 * elements)] * (1 + len(RADICES[rotation.n]))


def groups_moved(layer: Layer, role: str) -> Passes:
    """What pads the tokens of groups, E of both backward products once, and takes the result's out again."""
    if layer.groups != 0 and role != "wgrad":
        yield Pass("copy", layer.operands(role)[0])
        yield Pass("copy", layer.result(role))
