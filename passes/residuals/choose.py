"""Choose which products backward runs again, and which weights it quantises again, before kernels are chosen by it.

Two copies of the joint graph are divided: one in which every product's result can be kept, and, unless that is within
the budget without loss, one in which all of those are computed again whose codes are kept anyway. What the second does
not keep is laid to the products that it is made of; what several products make together is one item of the knapsack:

    item       a tensor that stays       exact | encoded
    item       codes of a parameter      kept | made again
    item       tensors and their products    each exact | encoded, or all products again

What else is computed again, element by element, the partitioner decides for itself, here as later. What this chooses
is a prediction of what is kept; the formats are chosen anew from what really is (``partition``).
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import product

from torch.fx import Node

from quartet.kernels.spec import dtype_name
from quartet.lowering import ir
from quartet.lowering.ir.graph import shape, val
from quartet.lowering.ir.operands import Product
from quartet.lowering.recipe.records import MemoryRecord, SavedRecord, Tradeoff
from quartet.passes.compilation import Compilation
from quartet.passes.naming import module_of
from quartet.passes.residuals.boundary import Storage, byte_count, shown_roots, stored_bytes
from quartet.passes.residuals.budget import Budget, BudgetError
from quartet.passes.residuals.formats import Formats, Served
from quartet.passes.residuals.knapsack import Choice, Frontier, Point
from quartet.passes.residuals.prices import FEMTO, Prices
from quartet.passes.residuals.trial import Divided, Trial, copy_of, kept_bytes, own_storages
from quartet.passes.sites import Quantized
from quartet.passes.state import State
from quartet.runtime.devices import Target
from quartet.runtime.sizes import hint

log = logging.getLogger("quartet")

PLAN_KEY = "quartet_memory"  # node.meta key of a joint graph's output: what was chosen for it
WEIGHT = "weight"  # what a record calls codes of a parameter that are not kept
SHOWN = 64  # points of a frontier that a report has
_MULTIPLIER = 4  # bytes of the one by which forward casts a weight, which are kept for backward to cast it again
_WIDEST = 64  # combinations of formats of one item; with more all its tensors are treated alike


@dataclass(frozen=True)
class Plan:
    """What was chosen for a graph before it was divided.

    Attributes:
        budget: what was asked for. plain: bytes that the same graph keeps without us.
        again: a record for the products that backward runs again, each group of them.
        time: what they take, in femtoseconds. frontier: what else could have been chosen; empty where no product could.
        slack: of the frontier.
    """

    budget: Budget
    plain: int
    again: tuple[SavedRecord, ...] = ()
    time: int = 0
    frontier: tuple[Tradeoff, ...] = ()
    slack: int = 0


@dataclass
class _Item:
    """Tensors that are chosen about together, and of what they are made that can run again: products, or the codes of
    a weight."""

    storages: list[Storage] = field(default_factory=list)
    makers: list[str] = field(default_factory=list)
    instead: int = 0  # bytes that are kept where these run again


def begin(state: State) -> None:
    """Note what a joint graph keeps without us, before any pass has changed it; of a budget that only asks which
    products run again, a copy by which that is found where there are any."""
    budget, copied = state.config.memory, copy_of(state.gm)
    assert budget is not None
    if budget.lossless:
        state.unchanged = copied
    else:
        _note(state, Plan(budget, kept_bytes(Trial(copied, state.config).divided())))


def _note(state: State, plan: Plan) -> None:
    state.gm.graph.output_node().meta[PLAN_KEY] = plan


def choose(state: State, candidates: Mapping[Node, Quantized], weights: Collection[Node] = ()) -> list[Node]:
    """What is to run again of the candidates, products of which backward has the codes of both operands, and of the
    codes ``weights``, which it can make of parameters; notes the plan at the graph."""
    began, unchanged = time.perf_counter(), state.unchanged
    if not candidates and not weights:
        return []
    if unchanged is not None:
        assert state.config.memory is not None
        _note(state, Plan(state.config.memory, kept_bytes(Trial(unchanged, state.config).divided())))
    plan: Plan = state.gm.graph.output_node().meta[PLAN_KEY]
    budget, plain, limit = plan.budget, plan.plain, plan.budget.limit(plan.plain)
    if limit is None:
        return []
    trial = Trial(copy_of(state.gm), state.config)
    kept = trial.divided()
    if budget.lossless and kept_bytes(kept) <= limit:
        return []
    again = trial.again(state.gm, candidates).divided()
    sites = {node.name: site for node, site in candidates.items()}
    prices = {node.name: Prices.of(state.config.target_of(val(node).device)).again(site)
              for node, site in candidates.items()}
    prices |= {node.name: Prices.of(state.config.target_of(val(node).device)).requantised(hint(val(node).numel()))
               for node in weights}
    items = _items(kept, again, sites, {node.name: _beside(node, site) for node, site in candidates.items()},
                   {node.name for node in weights})
    formats = formats_of(state.config, kept, not budget.lossless)
    choices = [_choices(item, formats, prices) for item in items]
    frontier = Frontier(choices)
    point = frontier.within(limit) or frontier.least()
    chosen = [item for item, pick, each in zip(items, point.picks, choices, strict=True)
              if item.makers and pick == len(each) - 1]
    names = {name for item in chosen for name in item.makers}
    nodes = {node.name: node for node in (*candidates, *weights)}
    _note(state, Plan(budget, plain, tuple(_record(item, nodes, prices, state.config) for item in chosen),
                      sum(prices[name] for name in names), tradeoffs(frontier, plain), frontier.slack))
    log.debug("memory: %d of %d products and weights again, %.0f ms", len(names), len(nodes),
              1e3 * (time.perf_counter() - began))
    return [node for node in nodes.values() if node.name in names]


def formats_of(config: Compilation, divided: Divided, chooses: bool) -> Formats:
    """What can be done with what is kept."""
    def target(storage: Storage) -> Target:
        return config.target_of(val(storage.root).device)

    of = cache(Prices.of)
    return Formats(config.policy.resolve_saved, shown_roots(divided.shown), divided.seen, chooses, target,
                   lambda storage: of(target(storage)), Served(divided.kept, chooses))


def measured(plan: Plan, frontier: Frontier, point: Point, records: Sequence[SavedRecord],
             config: Compilation) -> MemoryRecord:
    """What has come of a plan: what is kept of the graph as it was divided.

    A share is of all that a model keeps: a graph in which nothing can be chosen is not held to it.

    Raises:
        BudgetError: more than the budget, under ``strict``.
    """
    budget, kept = plan.budget, sum(record.saved_bytes for record in records)
    nominal = any(record.seconds is None for record in (*records, *plan.again))
    points = plan.frontier or tradeoffs(frontier, plan.plain)
    found = MemoryRecord(
        str(budget), None if budget.kind == "least" else budget.limit(plan.plain), budget.lossless, plan.plain, kept,
        min(kept, *(point.bytes for point in points)), (point.time + plan.time) / FEMTO, nominal,
        sum(r.op != WEIGHT for r in plan.again), sum(r.op == WEIGHT for r in plan.again),
        sum(r.saved is not None for r in records), plan.slack + frontier.slack, points)
    if not (found.fits or budget.lossless) and (found.open or budget.kind == "bytes"):
        text = (f"memory={budget} is {found.limit} bytes of what one graph keeps for backward, where "
                f"{plan.plain} are unquantised; {found.saved_bytes} are kept, and the least that can be is "
                f"{found.least}, {found.least / max(plan.plain, 1):.3f} of the unquantised. "
                "Activation checkpointing keeps less")
        if config.strict:
            raise BudgetError(text)
        warnings.warn(f"quartet: {text}", stacklevel=2)
    return found


def tradeoffs(frontier: Frontier, plain: int) -> tuple[Tradeoff, ...]:
    """At most ``SHOWN`` points of a frontier, both ends among them."""
    last = len(frontier.totals) - 1
    shown = sorted({round(i * last / (SHOWN - 1)) for i in range(SHOWN)}) if last >= SHOWN else range(last + 1)
    return tuple(Tradeoff(size, size / max(plain, 1), time / FEMTO)
                 for size, time in (frontier.totals[i] for i in shown))


def _items(kept: Divided, again: Divided, sites: Mapping[str, Quantized],
           beside: Mapping[str, Sequence[Node]], weights: Collection[str]) -> list[_Item]:
    """The knapsack's items: what both divisions keep one by one, codes of ``weights`` among it, the rest with its
    products.

    ``beside``: codes that are kept for a product to run again, of which no division knows; who shares some is one item.
    """
    ours, theirs = own_storages(kept), own_storages(again)
    stays = {storage.root.name for storage in theirs}
    common = {storage.root.name for storage in ours} & stays
    items = [_Item([storage], [name], _MULTIPLIER) if name in weights else _Item([storage]) for storage in ours
             if (name := storage.root.name) in common]
    groups: dict[str, _Item] = {}
    for storage in (s for s in ours if s.root.name not in common):
        made = _products(storage.root, common, sites)
        item = _joined(groups, made) if made else _Item()
        item.storages.append(storage)
        items += [] if made else [item]
    for storage in (s for s in theirs if s.root.name not in common):
        made = [name for name in _products(storage.root, common, sites) if name in groups]
        if made:
            _joined(groups, made).instead += stored_bytes(storage)
    for codes in dict.fromkeys(codes for name in groups for codes in beside[name]):
        _joined(groups, [name for name in groups if codes in beside[name]]).instead += byte_count(codes)
    return items + list({id(item): item for item in groups.values()}.values())


def _beside(product: Node, site: Quantized) -> list[Node]:
    """The codes that a product multiplies and of which backward otherwise reads transposes, tensors of their own."""
    found = []
    for role, operand in zip(("wgrad", "dgrad"), Product.of(product).operands, strict=True):
        kernel = site.decisions[role].kernel
        if kernel is not None and kernel.row_major and operand.spec.commutes_with_transpose:
            found.append(operand.codes)
    return found


def _joined(groups: dict[str, _Item], products: Sequence[str]) -> _Item:
    """The one item of some products; those that had items of their own are put together."""
    whole = _Item()
    for old in {id(groups[name]): groups[name] for name in products if name in groups}.values():
        whole.storages += old.storages
        whole.makers += old.makers
        whole.instead += old.instead
    whole.makers += [name for name in products if name not in whole.makers]
    groups |= dict.fromkeys(whole.makers, whole)
    return whole


def _products(root: Node, kept: set[str], sites: Mapping[str, Quantized]) -> list[str]:
    """The products that a tensor is made of, from what is kept in any case."""
    found, todo, seen = [], [root], {root}
    while todo:
        node = todo.pop()
        if node.name in sites:
            found.append(node.name)
        elif node is root or node.name not in kept:
            fresh = [n for n in node.all_input_nodes if n not in seen]
            seen.update(fresh)
            todo += fresh
    return sorted(found)


def _choices(item: _Item, formats: Formats, prices: Mapping[str, int]) -> list[Choice]:
    """The choices of an item, the last of one with makers: to run them again."""
    ways = [[way.cost for way in formats.ways(storage, module_of(storage.root))] for storage in item.storages]
    found = [_sum(costs) for costs in _combinations(ways)]
    if item.makers:
        found.append(Choice(item.instead, sum(prices[name] for name in item.makers)))
    return found


def _combinations(ways: Sequence[Sequence[Choice]]) -> Iterator[Sequence[Choice]]:
    count = 1
    for each in ways:
        count *= len(each)
    if count <= _WIDEST:
        yield from product(*ways)
    else:
        yield [each[0] for each in ways]
        yield [each[-1] for each in ways]


def _sum(costs: Sequence[Choice]) -> Choice:
    return Choice(sum(cost.bytes for cost in costs), sum(cost.time for cost in costs))


def _record(item: _Item, nodes: Mapping[str, Node], prices: Mapping[str, int], config: Compilation) -> SavedRecord:
    """What is not kept, because it is made again."""
    first, size, count = nodes[item.makers[0]], sum(map(stored_bytes, item.storages)), len(item.makers)
    if first.target is ir.SCALED_MM:
        kind, what = "product", "product again" if count == 1 else f"{count} products again"
        reason = "backward multiplies the codes again, which are kept anyway"
    else:
        kind, what, reason = WEIGHT, "quantised again", "backward makes the codes of the parameter again"
    return SavedRecord(
        first.name, module_of(first), kind, tuple(s if isinstance(s, int) else str(s) for s in shape(first)),
        dtype_name(val(first).dtype), size, what, 0, reason,
        Prices.of(config.target_of(val(first).device)).seconds(sum(prices[name] for name in item.makers)))
