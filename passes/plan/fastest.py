"""Which of several recipes each layer gets: the one under which it is predicted to be the fastest.

Under each recipe by itself it is found what pays (``profitability``). Layers that read one X share the cost of its
codes and take the same recipe, so that it is weighed for all of them together:

    time of a recipe    Σ over the layers of (quantised where that pays, else in the model's dtype)

A recipe of fewer bits has to save ``EQUAL`` of the time beside one of more: what is as fast in more bits is more exact.
Alternatives are weighed for products in bfloat16, of which the rates are.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch

from quartet.lowering.cost import Cost
from quartet.passes.classify.aside import tokens
from quartet.passes.compilation import Compilation
from quartet.passes.plan.profitability import Count, is_weighed, leave_slower
from quartet.passes.plan.sharing import value_key
from quartet.passes.sites import Decided, Found, Planned
from quartet.passes.state import State

EQUAL = 0.02  # by which share two times may differ and count as one: two runs of a measurement do
Prices = Sequence[dict[int, Cost]]  # of each trial: index of a site → what it is predicted to cost


def fastest(trials: Callable[[], Sequence[State]], config: Compilation) -> list[Decided]:
    """All sites, each as the fastest trial has it.

    Args:
        trials: makes the sites anew as each candidate of the policy decides them, the default's first.
    """
    found = _fastest(trials(), lambda site: tokens(site, config))
    if config.guessed:
        guess = _fastest(trials(), lambda site: config.guessed.get(site.fqn) or tokens(site, config))
        _warn_changed([now.fqn for now, then in zip(found, guess, strict=True)
                       if now.fqn in config.guessed and _as_planned(now) != _as_planned(then)])
    return found


def _fastest(trials: Sequence[State], count: Count) -> list[Decided]:
    weighed = [{site.index for site in trial.at(Planned) if is_weighed(site)} for trial in trials]
    prices = [leave_slower(trial, count) for trial in trials]
    found: dict[int, Decided] = {}
    for members in _of_one_x(trials[0].at(Decided)):
        known = all(trials[0].site(i).dtype is torch.bfloat16 for i in members)
        some, costs = (trials, prices) if known else (trials[:1], prices[:1])
        free = [i for i in members if any(i in each for each in weighed)]
        pick = _pick(free, some, costs)
        found |= {i: _told(i, pick if i in free else 0, some, costs) for i in members}
    return [found[site.index] for site in trials[0].sites]


def _of_one_x(sites: Iterable[Found]) -> list[list[int]]:
    """The sites that read the same X, whatever they make of it."""
    groups: defaultdict[object, list[int]] = defaultdict(list)
    for site in sites:
        key = value_key(site.x[0]), site.x[1], str(site.batch), site.groups and site.groups.offs
        groups[key].append(site.index)
    return list(groups.values())


def _pick(members: Sequence[int], trials: Sequence[State], prices: Prices) -> int:
    """The trial under which sites take the least; the first where nothing is quantised or has a price."""
    plain = {i: max(each[i].plain_step for each in prices if i in each)
             for i in members if any(i in each for each in prices)}
    pick, least = 0, float("inf")
    for trial in sorted(range(len(trials)), key=lambda t: -_bits(members, trials[t])):
        paid = [i for i in members if i in prices[trial] and isinstance(trials[trial].site(i), Planned)]
        time = sum(prices[trial][i].step if i in paid else plain.get(i, 0.0) for i in members)
        if paid and time < (1 - EQUAL) * least:
            pick, least = trial, time
    return pick


def _bits(members: Sequence[int], trial: State) -> int:
    """Of the codes of some sites."""
    return min((site.recipe.bits for i in members if isinstance(site := trial.site(i), Planned)), default=0)


def _told(index: int, pick: int, trials: Sequence[State], prices: Prices) -> Decided:
    """A site as one trial has it, with what it would take under the recipes of the others."""
    site = trials[pick].site(index)
    assert isinstance(site, Decided)
    others = [f"{1e6 * each[index].step:.0f} µs by {name!r}" for trial, each in zip(trials, prices, strict=True)
              if trial is not trials[pick] and index in each and (name := _name(trial.site(index)))]
    if not others:
        return site
    more = f"; {', '.join(others)}"
    if isinstance(site, Planned):
        *notes, predicted = site.notes
        return replace(site, notes=(*notes, predicted + more))
    return replace(site, reasons={role: reason + more for role, reason in site.reasons.items()})


def _name(site: Found) -> str:
    """The recipe that a site was weighed under."""
    recipe = site.resolution.recipe_for("fprop") if isinstance(site, Decided) else None
    return "" if recipe is None else recipe.name


def _as_planned(site: Decided) -> tuple[str, ...]:
    return (site.recipe.name, *site.recipe.roles) if isinstance(site, Planned) else ()


def _warn_changed(changed: Sequence[str]) -> None:
    """Say which layers were quantised otherwise in graphs that evaluated the model before it was trained."""
    if changed:
        warnings.warn(
            f"quartet: {len(changed)} layers are decided otherwise for training than in the graphs that evaluated the "
            f"model before ({', '.join(changed[:3])}{', …' if len(changed) > 3 else ''}): those were priced for other "
            "numbers of tokens and stay as they are until they are compiled again; torch.compiler.reset() does, or "
            "train before you evaluate", stacklevel=2)
