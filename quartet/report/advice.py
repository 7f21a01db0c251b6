"""Where the default quantises nothing: what else would pay on that device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch

from quartet.kernels.spec import dtype_name
from quartet.lowering import registry
from quartet.lowering.cost import Cost, Layer, predict
from quartet.lowering.rates import Rates, kept, rates_of
from quartet.lowering.recipe.records import MatmulRecord
from quartet.lowering.recipe.types import ROLES, Recipe
from quartet.recipes import recipes
from quartet.runtime.devices import Target

UNPAID = ("would not pay", "no rates of", "no measured rates")  # how reasons begin of what was left for its price
CANDIDATES = ("fp8", "int8-all", "int8")  # recipes for speed
BF16 = dtype_name(torch.bfloat16)
ANYWAY = "A recipe as policy, such as 'quartet', quantises whether it pays or not, for its memory or to study it"


class _Size(NamedTuple):
    """Of a layer; its part of what graphs take the host to be called."""

    tokens: int
    out: int
    into: int
    called: float


def advice(records: Sequence[MatmulRecord], target: Target) -> str:
    """Which recipe would make linear layers faster that the default leaves alone, and how to have one all the same."""
    rates, layers = rates_of(target), list(_layers(records))
    if rates is None:
        reason = kept.unfit(target)
        return (f"`quartet calibrate` measures a GPU by which that can be told. {ANYWAY}" if reason is None else
                f"What would pay cannot be told, nor can `quartet calibrate` measure it: {reason}. {ANYWAY}")
    if any(narrower(r, target) for r in records):
        return (f"What is fast on {target.title} is for bfloat16: train in it, model.bfloat16() or torch.autocast. "
                f"{ANYWAY}")
    others = dict.fromkeys(r.dtype for r in _left(records) if r.dtype != BF16)
    if others and not layers:
        return (f"How fast {target.title} multiplies in {' and '.join(others)} is not among its rates, so nothing can "
                f"be compared with it: train in bfloat16, model.bfloat16() or torch.autocast. {ANYWAY}")
    gains = {name: gain for name in CANDIDATES if (gain := _gain(recipes()[name], layers, target, rates)) > 1.0}
    if not gains:
        return f"No recipe pays on {target.title} at these sizes, by {rates.source}. {ANYWAY}"
    best = max(gains, key=lambda name: gains[name])
    return (f"On {target.title} {best!r} would: {gains[best]:.2f} times the speed of the linear layers, by "
            f"{rates.source}. {ANYWAY}")


def narrower(record: MatmulRecord, target: Target) -> bool:
    """Whether a product was left alone for its dtype, which the tensor cores of narrow formats do not give."""
    return record.dtype != BF16 and target.lacks("fp8 tensor cores") is None and (
        record.reason.startswith(UNPAID))


def _left(records: Sequence[MatmulRecord]) -> Iterator[MatmulRecord]:
    """The forward products of linear layers that were left alone for their price."""
    return (r for r in records if r.op_class == "linear" and r.role == "fprop" and r.reason.startswith(UNPAID))


def _layers(records: Sequence[MatmulRecord]) -> Iterator[_Size]:
    """The linear layers in bfloat16, of which rates are, and of known sizes."""
    for r in _left(records):
        m, n, k = r.m, r.n, r.k
        if r.dtype == BF16 and isinstance(m, int) and isinstance(n, int) and isinstance(k, int):
            yield _Size(m, n, k, r.called)


def _gain(recipe: Recipe, layers: Sequence[_Size], target: Target, rates: Rates) -> float:
    """How many times faster the layers would be that are, in the time of all; 1 where none is."""
    kernels = {role: registry.multiplies(getattr(recipe, role), target, torch.bfloat16) for role in ROLES}

    @cache
    def cost(size: _Size) -> Cost | None:
        return predict(recipe, Layer(kernels, size.tokens, size.out, size.into, called=size.called), rates)

    known = [one for size in layers if (one := cost(size)) is not None]
    before = sum(one.plain_step for one in known)
    after = sum(one.step if one.pays else one.plain_step for one in known)
    return before / after if after else 1.0
