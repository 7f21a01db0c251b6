"""Rules that never decide, because a later one is about all that they are about."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from quartet.lowering.recipe.op_classes import OP_GROUPS, skips
from quartet.recipes import resolve


def shadowed(rules: Sequence[Any]) -> Iterator[tuple[int, str]]:
    """(index, text for the user) of each of some ``quartet.policy.Rule`` that a single later one leaves nothing."""
    for i, rule in enumerate(rules):
        later = next((j for j in range(len(rules) - 1, i, -1) if _covers(rules[j], rule)), None)
        if later is not None:
            yield i, (f"rule {i}: {rule.call()} decides nothing: rule {later}: {rules[later].call()} comes later and "
                      "is about all of it; the last match wins")


def _covers(later: Any, rule: Any) -> bool:
    """Whether a rule is about every matmul and role that another is about."""
    conditions = ((later.fqn, rule.fqn, later.fqn == "*" and rule.fqn is not None),
                  (later.shape, rule.shape, False), (later.layers, rule.layers, False))
    if not all(wide is None or wide == narrow or special for wide, narrow, special in conditions):
        return False
    if not set(later.roles) >= set(rule.roles) or (later.op == "saved") != (rule.op == "saved"):
        return False
    classes = None if rule.op is None else OP_GROUPS.get(rule.op, (rule.op,))
    if later.op is not None:
        return classes is not None and set(classes) <= set(OP_GROUPS.get(later.op, (later.op,)))
    recipe = resolve(later.recipe)
    if later.fqn is not None or recipe is None:
        return True
    if classes is not None:
        return not any(skips(recipe, op_class) for op_class in classes)
    return bool(rule.is_general) and set(recipe.skip) <= set(resolve(rule.recipe).skip)
