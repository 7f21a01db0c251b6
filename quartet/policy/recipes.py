"""The recipes that a policy can choose, and what follows from them for a whole compilation."""

from __future__ import annotations

from quartet.lowering.recipe.types import Recipe
from quartet.policy import Policy
from quartet.recipes import resolve


def recipes_of(policy: Policy) -> list[Recipe]:
    """Every recipe that the policy can choose."""
    chosen = map(resolve, (policy.default, *policy.alternatives, *(rule.recipe for rule in policy.rules)))
    return [recipe for recipe in chosen if recipe is not None]


def remembers(policy: Policy) -> bool:
    """Whether a recipe of the policy scales by what operands were in earlier steps."""
    return any(recipe.remembers for recipe in recipes_of(policy))


def quantizes(policy: Policy) -> bool:
    """Whether any matmul could be quantised under the policy."""
    return any(recipe.quantizes for recipe in recipes_of(policy))
