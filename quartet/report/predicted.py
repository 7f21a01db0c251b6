"""How much faster the linear layers of a model are predicted to be than in the model's dtype."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from quartet.lowering import registry
from quartet.lowering.cost import Layer, predict
from quartet.lowering.rates import Rates, rates_of
from quartet.lowering.recipe.records import MatmulRecord, MemoryRecord
from quartet.policy import Policy
from quartet.report.advice import BF16
from quartet.runtime.devices import Target

KERNELS = {kernel.name: kernel for kernel in registry.KERNELS}


def predicted_speed(records: Sequence[MatmulRecord], policy: Policy, target: Target,
                    memory: Sequence[MemoryRecord] = ()) -> float | None:
    """Seconds of all linear layers in bfloat16, of those whose sizes and prices are known, over seconds as they are,
    with what their budgets of memory add; None where no rates of the device are known, or of no layer."""
    rates = rates_of(target)
    times = [] if rates is None else list(_times(records, policy, rates))
    plain, ours = (sum(column) for column in zip(*times, strict=True)) if times else (0.0, 0.0)
    return plain / (ours + sum(record.seconds for record in memory)) if ours else None


def _times(records: Sequence[MatmulRecord], policy: Policy, rates: Rates) -> Iterator[tuple[float, float]]:
    """(in the model's dtype, as it is) of each linear layer, in seconds."""
    for _, group in groupby(records, key=lambda r: (r.fqn, r.site)):
        members = {r.role: r for r in group}
        r = members.get("fprop")
        if r is None or r.dtype != BF16 or r.op_class not in ("linear", "lm_head", "router") or r.flops is None:
            continue
        kernels = {role: KERNELS.get(one.kernel or "") for role, one in members.items()}
        layer = Layer(kernels, r.m, r.n, r.k, called=r.called)
        plain = [layer.product(rates, "bf16", role) for role in members]
        if any(time is None for time in plain):
            continue
        alone = float(sum(time.device for time in plain))
        lowered = {role for role, kernel in kernels.items() if kernel is not None}
        if not lowered:
            yield alone, alone
            continue
        decides = policy.candidate(r.recipe)
        recipe = decides.resolve(r.op_class, r.fqn, r.m, r.n, r.k).effective.only(lowered)
        cost = predict(recipe, layer, rates)
        if cost is not None:
            yield cost.plain_step, cost.step
