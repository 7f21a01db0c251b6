"""Leave the products in the model's dtype that a policy's default recipe is predicted to make slower.

A layer's three products are weighed one by one where the recipe lets them be apart: for every set of them that can be
quantised without the others, the whole layer is priced (``quartet.lowering.cost``), what the products share included,
and the cheapest set is taken. A backward product that starts from what forward quantised can not be apart from it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import combinations

from torch.fx import Node

from quartet.lowering import ir, registry
from quartet.lowering.cost import FP8_KERNELS, Cost, Layer, predict
from quartet.lowering.graph import VIEWS, is_backward, val
from quartet.lowering.rates import Rates, rates_of
from quartet.lowering.recipe import ROLES, Gemm, Recipe
from quartet.passes.sites import MatmulSite
from quartet.passes.state import State, recipe_of
from quartet.runtime.devices import Target
from quartet.runtime.sizes import hint


def leave_slower(state: State) -> None:
    """Take out of the plan what would not pay; note the prediction at what does.

    What leaves no longer shares the cost of an X with what stays, so this is repeated until nothing leaves.
    """
    costs: dict[int, Cost] = {}
    while _once(state, costs):
        pass
    for site in state.planned():
        if site.index in costs:
            site.notes += (f"predicted {costs[site.index]}, forward and backward",)


def _once(state: State, costs: dict[int, Cost]) -> bool:
    """One round; fills in the costs of what stays. Whether anything has left."""
    sharing = Counter(site.x_group for site in state.planned())
    before = [site.recipe for site in state.sites]
    for site in state.planned():
        rates = rates_of(state.config.target_of(val(site.x[0]).device))
        resolution = site.resolution
        if rates is None or resolution is None or any(resolution.choice(role).rule is not None for role in ROLES):
            continue
        if site.scaled is not ir.SCALED_MM:
            _leave(site, dict.fromkeys(ROLES, "the cost model knows neither groups nor batches: name it in a rule"))
        else:
            _decide(site, _layer(state, site, sharing[site.x_group]), rates, costs)
    return before != [site.recipe for site in state.sites]


def _decide(site: MatmulSite, layer: Layer, rates: Rates, costs: dict[int, Cost]) -> None:
    """Keep the set of products that is predicted to be the fastest."""
    recipe, parts = recipe_of(site), units(recipe_of(site), site.products)
    sets = [frozenset[str]().union(*some) for count in range(len(parts), 0, -1) for some in combinations(parts, count)]
    prices = {roles: cost for roles in sets if (cost := predict(recipe.only(roles), layer, rates)) is not None}
    best = min(prices, key=lambda roles: float(prices[roles].quantized), default=frozenset[str]())
    if not best or not prices[best].pays:
        shown = prices.get(sets[0], prices.get(best))
        _leave(site, dict.fromkeys(ROLES, _unmeasured(layer, sets[0]) if shown is None else
                                   f"would not pay: predicted {shown}, forward and backward"))
        return
    costs[site.index] = prices[best]
    for part in parts:
        if not part <= best:
            reason = _unmeasured(layer, part) or (
                f"would not pay: predicted {_time(prices[best | part])} for the layer with it quantised, "
                f"{_time(prices[best])} without, forward and backward")
            _leave(site, dict.fromkeys(part, reason))


def units(recipe: Recipe, roles: Iterable[str]) -> list[frozenset[str]]:
    """Those of a layer's products that a recipe quantises, parted into what can be quantised without the others."""
    gemms = {role: gemm for role in ROLES if role in roles and (gemm := getattr(recipe, role)) is not None}
    tied = frozenset(role for role, gemm in gemms.items() if role == "fprop" or gemm.b.source == "saved")
    return [part for part in (tied, *(frozenset({role}) for role in gemms if role not in tied)) if part]


def _leave(site: MatmulSite, reasons: Mapping[str, str]) -> None:
    recipe = recipe_of(site).only({role for role in ROLES if role not in reasons})
    site.recipe = recipe if recipe.quantizes else None
    site.reasons |= reasons
    site.remarks = {role: text for role, text in site.remarks.items() if role not in reasons}


def _time(cost: Cost) -> str:
    return f"{1e6 * float(cost.quantized):.0f} µs"


def _unmeasured(layer: Layer, roles: Iterable[str]) -> str:
    """Why there is no prediction; empty where there is one."""
    unknown = [layer.kernels[role] for role in ROLES if role in roles and layer.kernels[role] not in FP8_KERNELS]
    names = " and ".join(repr(kernel) if kernel else "a dequantised operand" for kernel in dict.fromkeys(unknown))
    return f"no measured rates for kernel {names}: name it in a rule" if names else ""


def _layer(state: State, site: MatmulSite, sharing: int) -> Layer:
    recipe = recipe_of(site)
    target = state.config.target_of(val(site.x[0]).device)
    recompute = ((state.config.recompute or recipe.recompute) == "gemm" and len(site.products) > 1
                 and _read_in_backward(site.products["fprop"].node))
    kernels = {role: _kernel(state, site, role, target) for role in site.products}
    m, n, k = map(hint, (site.m, site.n, site.k))
    return Layer(kernels, m, n, k, sharing, recompute)


def _read_in_backward(y: Node) -> bool:
    """Whether backward reads a product's result, or a view or cast of it: then it is kept, or computed again."""
    return any(is_backward(user) or user.target in VIEWS and _read_in_backward(user) for user in y.users)


def _kernel(state: State, site: MatmulSite, role: str, target: Target) -> str:
    """The kernel that a product will get; "" where it is in the model's dtype."""
    gemm = site.active(role)
    if gemm is None or gemm.a.spec is None:
        return ""
    return kernel_of(gemm, site, target, state.config.disable_kernels)


def kernel_of(gemm: Gemm, site: MatmulSite, target: Target, disabled: tuple[str, ...]) -> str:
    """Name of the kernel that takes a quantised product of a layer, "" for none."""
    assert gemm.a.spec is not None and gemm.b.spec is not None
    rotation = gemm.rotation.n if gemm.rotation is not None else 0
    kernel, _ = registry.choose(target, site.dtype, ((gemm.a.spec, rotation), (gemm.b.spec, rotation)), disabled,
                                site.scaled)
    return "" if kernel is None else kernel.name
