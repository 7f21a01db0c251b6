"""Leave the products in the model's dtype that a policy's default recipe is predicted to make slower.

The decision is the layer's, not the graph's: it is priced as it is trained, all three products, for the tokens that
training was first seen with, also in graphs that evaluate it, that have it frozen, or that are given other lengths. A
layer's three products are weighed one by one where the recipe lets them be apart: for every set of them that can be
quantised without the others, the whole layer is priced (``quartet.lowering.cost``), what the products share included,
and the cheapest set is taken. A backward product that starts from what forward quantised can not be apart from it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

from torch.fx import Node

from quartet.lowering.cost import Cost, Layer, predict, simulated
from quartet.lowering.ir.graph import source_of, val
from quartet.lowering.rates import Host, Rates, kept, rates_of
from quartet.lowering.recipe.types import ROLES, WEIGHED, Recipe
from quartet.passes.flow import Flow
from quartet.passes.sites import Found, Planned
from quartet.passes.state import State
from quartet.runtime.sizes import hint
from quartet.runtime.view_ops import PASSED_ON, VIEWS

Count = Callable[[Found], int]  # by how many tokens a site is priced
HELP = "`quartet calibrate` measures them, and a rule that names it quantises it"
_MULTIPLES = ("aten.mul.", "aten.div.", "aten.clone", "aten.expand", "aten.split", "aten.unbind", "aten._to_copy",
              "aten.reshape")
_UNREAD = ("aten.add.", "aten.sub.", "aten.neg", "aten.sum", "aten.mean", "aten.cat", "aten.stack", "aten.relu",
           "aten.tanh", "aten.sigmoid", "aten.exp.", "aten._softmax", "aten.amax")  # by their results


def leave_slower(state: State, count: Count) -> dict[int, Cost]:
    """Take out of the plan what would not pay for so many tokens, and say so; index of a site → what it is predicted to
    cost, of those that have a price, quantised in the end or not.

    What leaves no longer shares the cost of an X with what stays, so this is repeated until nothing leaves.
    """
    costs: dict[int, Cost] = {}
    while _once(state, costs, count):
        pass
    for site in state.at(Planned):
        if site.index in costs:
            note = f"predicted {costs[site.index]}, {_basis(site, state, count)}"
            state.advance(site.at_price(costs[site.index]).note(note))
    return costs


def _once(state: State, costs: dict[int, Cost], count: Count) -> bool:
    """One round; fills in the costs. Whether anything has left."""
    groups = _groups(state)
    left = False
    for site in state.at(Planned):
        if not is_weighed(site):
            continue
        rates = _rates(state, site)
        if rates is None:
            reasons = _unknown(site, state)
        else:
            layer = _layer(state, site, groups[site.x_group], count(site))
            reasons = _slower(site, layer, rates, costs, _basis(site, state, count))
        if reasons:
            state.advance(site.without(reasons))
            left = True
    return left


def _rates(state: State, site: Found) -> Rates | None:
    """The constants of a site's device; the host is never what limits where CUDA graphs are replayed."""
    rates = rates_of(state.config.target_of(val(site.x[0]).device))
    return replace(rates, host=Host()) if rates is not None and state.config.replayed else rates


def _unknown(site: Planned, state: State) -> dict[str, str]:
    """Role → why it is left alone where no rates are known; on what is no GPU only experts are."""
    target = state.config.target_of(val(site.x[0]).device)
    if target.type == "cuda":
        return dict.fromkeys(ROLES, f"no rates of {target.title}, by which it could be said whether it pays: "
                                    f"{HELP if kept.unfit(target) is None else 'name it in a rule'}")
    if site.op_class in WEIGHED:
        return dict.fromkeys(ROLES, f"{site.op_class} is quantised by default where that pays, and no rates of "
                                    f"{target.title} are known: name it in a rule")
    return {}


def is_weighed(site: Planned) -> bool:
    """Whether the policy's default decides about all of a site's products."""
    return all(site.resolution.choice(role).rule is None for role in ROLES)


def _slower(site: Planned, layer: Layer, rates: Rates, costs: dict[int, Cost], basis: str) -> dict[str, str]:
    """Role → why it is not in the set of products that is predicted to be the fastest; fills in the cost of that, or
    of what would be slower."""
    parts = units(site.recipe, ROLES)
    best, prices = _cheapest(site.recipe, layer, rates)
    whole = frozenset[str]().union(*parts)
    if not best:
        shown = prices.get(whole, min(prices.values(), key=lambda cost: float(cost.quantized), default=None))
        if shown is not None:
            costs[site.index] = shown
        return dict.fromkeys(ROLES, _unmeasured(layer, site.recipe, rates, whole) if shown is None else
                             f"would not pay: predicted {shown}, {basis}")
    costs[site.index] = prices[best]
    reasons: dict[str, str] = {}
    for part in parts:
        if not part <= best:
            reasons |= dict.fromkeys(part, _unmeasured(layer, site.recipe, rates, part) or (
                f"would not pay: predicted {_time(prices[best | part])} for the layer with it quantised, "
                f"{_time(prices[best])} without, {basis}"))
    return reasons


def _cheapest(recipe: Recipe, layer: Layer, rates: Rates) -> tuple[frozenset[str], dict[frozenset[str], Cost]]:
    """The set of products that is fastest quantised, empty where none is faster than the model's dtype; every price."""
    parts = units(recipe, ROLES)
    sets = [frozenset[str]().union(*some) for count in range(len(parts), 0, -1) for some in combinations(parts, count)]
    prices = {roles: cost for roles in sets if (cost := predict(recipe.only(roles), layer, rates)) is not None}
    best = min(prices, key=lambda roles: (prices[roles].step, float(prices[roles].quantized)),
               default=frozenset[str]())
    return (best if best and prices[best].pays else frozenset()), prices


def units(recipe: Recipe, roles: Iterable[str]) -> list[frozenset[str]]:
    """Those of a layer's products that a recipe quantises, parted into what can be quantised without the others."""
    gemms = {role: gemm for role in ROLES if role in roles and (gemm := getattr(recipe, role)) is not None}
    tied = frozenset(role for role, gemm in gemms.items() if role == "fprop" or gemm.b.source == "saved")
    return [part for part in (tied, *(frozenset({role}) for role in gemms if role not in tied)) if part]


def _time(cost: Cost) -> str:
    return f"{1e6 * float(cost.quantized):.0f} µs"


def _unmeasured(layer: Layer, recipe: Recipe, rates: Rates, roles: Iterable[str]) -> str:
    """Why there is no prediction; empty where there is one."""
    unknown = [layer.kernels[role] for role in ROLES if role in roles and layer.price(rates, recipe, role) is None]
    slow = dict.fromkeys(kernel.name for kernel in unknown if kernel is not None and kernel.price is simulated)
    if slow:
        return (f"would not pay: kernel {' and '.join(map(repr, slow))} multiplies in the model's dtype here, which "
                "saves no time")
    names = " and ".join(repr(kernel.name) if kernel else "a dequantised operand" for kernel in dict.fromkeys(unknown))
    return f"no measured rates for kernel {names}: name it in a rule" if names else ""


def _basis(site: Found, state: State, count: Count) -> str:
    """What a price is of, also for how many tokens where that is not what the graph has, and by whose rates."""
    tokens, rates = count(site), _rates(state, site)
    same = isinstance(site.m, int) and site.m == tokens
    return f"forward and backward{'' if same else f' of {tokens} tokens'}, by {'' if rates is None else rates.source}"


def _groups(state: State) -> Mapping[int, list[Planned]]:
    """The sites that quantise the same X, by its first."""
    groups: defaultdict[int, list[Planned]] = defaultdict(list)
    for site in state.at(Planned):
        groups[site.x_group].append(site)
    return groups


def _layer(state: State, site: Planned, group: Sequence[Planned], tokens: int) -> Layer:
    """The layer of a site, of a ``group`` that quantises one X, with the three products that it has in training.

    Whether backward runs the product of forward again is the recipe's to say, or the option's. The default budget
    decides it after the plan, and keeps the result unless memory is short: the layer is priced with it kept.
    """
    config = state.config
    lossless = config.memory is not None and config.memory.lossless
    asked = config.recompute or ("none" if lossless else site.recipe.recompute)
    recompute = asked == "gemm" and site.kind.single and is_read_in_backward(site.forward.node, state.flow)
    summed = "sum_first" not in config.disable_passes and are_summed(group, state.flow)
    kernels = {role: decision.kernel for role, decision in site.decisions.items()}
    groups = 0 if site.groups is None else hint(site.groups.count)
    return Layer(kernels, tokens, hint(site.n), hint(site.k), len(group), recompute, groups,
                 1 if site.batch is None else hint(site.batch), summed, config.called)


def are_summed(group: Sequence[Planned], flow: Flow) -> bool:
    """Whether backward surely adds up the gradients of a group's X before they leave the basis of its codes
    (``quartet.passes.quantize.sum_first``): X is one value, where autocast has a cast for each, behind which a gradient
    is cast before the addition; nothing but the group's products reads it; checkpointing has all of them or none.

    It is told by what forward does with X, so that a graph without backward gives the same answer.
    """
    roots = {root_of(site.x[0]) for site in group}
    products = {site.forward.node for site in group}
    again = {(node.meta.get("recompute"), node.meta.get("ac_graph_id")) for node in products}
    (root, *more) = roots
    return not more and len(again) == 1 and set(_readers(root, flow)) == products


def root_of(node: Node) -> Node:
    """What a node is a view of, through every view."""
    while node.target in VIEWS:
        node = source_of(node)
    return node


def _readers(node: Node, flow: Flow) -> Iterator[Node]:
    """What reads a value in forward, or a view of it."""
    for user in node.users:
        if user in flow.order:
            yield from _readers(user, flow) if user.target in VIEWS else (user,)


def is_read_in_backward(y: Node, flow: Flow) -> bool:
    """Whether backward reads a product's result, or a view, cast or multiple of it: then it is kept, or computed again.

    It is told by what forward does with the result, so that a graph without backward gives the same answer.
    """
    for user in y.users:
        name = str(user.target)
        if user not in flow.order or user.op != "call_function" or name.startswith(_UNREAD):
            continue
        scaled = name.startswith(_MULTIPLES) and not any(
            other in flow.made or other in flow.origin for other in user.all_input_nodes if other is not y)
        if not (scaled or user.target in PASSED_ON) or is_read_in_backward(user, flow):
            return True
    return False
