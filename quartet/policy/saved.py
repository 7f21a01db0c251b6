"""The part of a policy that is about saved activations: ``on(op="saved", recipe="e4m3/16")``.

A rule with ``op="saved"`` decides what the modules of its glob, or all, keep for other purposes than products; the last
match wins, and without one the default recipe does unless it skips the class. Rules about modules or about matmuls say
nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from quartet.lowering.recipe.resolution import SavedChoice
from quartet.lowering.recipe.types import ROLES, Recipe
from quartet.policy.unmatched import Unmatched, nearest_names
from quartet.recipes import PolicyError, recipes, resolve

SAVED = "saved"


def check_rule(rule: Any) -> None:
    """Raise PolicyError for a rule that asks of saved activations what only a matmul has, or the reverse."""
    recipe = resolve(rule.recipe)
    if rule.op == SAVED:
        if recipe is not None and recipe.saved is None and recipe.quantizes:
            raise PolicyError(f"recipe {recipe.name!r} quantises matmuls and says nothing of saved activations; "
                              f"possible on op 'saved': {', '.join(formats())}, a Recipe with saved=…, or None to "
                              "leave them exact", ("recipe",))
        if rule.shape is not None:
            raise PolicyError(f"a shape, here {rule.shape!r}, is about the m, n and k of a matmul; a rule about saved "
                              "activations takes a glob over the modules that make them", ("shape",))
        if rule.roles != ROLES:
            raise PolicyError(f"a role, here {', '.join(rule.roles)}, is about the products of a matmul; saved "
                              "activations have none", ("role",))
    elif recipe is not None and recipe.saved is not None and not recipe.quantizes and (rule.op or rule.fqn):
        where = f"op class {rule.op!r}" if rule.op else f"the matmuls of {rule.fqn!r}"
        matmuls = [name for name, known in recipes().items() if known.quantizes]
        what = f"{rule.fqn!r}, {recipe.name!r}" if rule.fqn else f"recipe={recipe.name!r}"
        raise PolicyError(f"recipe {recipe.name!r} is a format of saved activations and cannot be that of {where}, "
                          f"where these are possible: {', '.join(matmuls)}; on({what}, op='saved') decides what "
                          "modules save", ("recipe",))


def formats() -> list[str]:
    """Names of the recipes that say how activations are saved."""
    return [name for name, recipe in recipes().items() if recipe.saved is not None]


def saved_choice(policy: Any, fqn: str | None) -> SavedChoice:
    """What a policy decides for the tensors that the module ``fqn`` leaves for backward; None where it is not known."""
    for i, rule in reversed(list(enumerate(policy.rules))):
        named = rule.op == SAVED and rule.is_about(fqn or "")
        recipe = resolve(rule.recipe)
        if named or (rule.op is None and rule.fqn is None and _applies(recipe)):
            why = f"rule {i}: {rule.call()}"
            return SavedChoice(recipe.saved if recipe is not None else None, why, i)
    recipe = resolve(policy.default)
    if _applies(recipe):
        assert recipe is not None
        return SavedChoice(recipe.saved, f"default recipe {recipe.name!r}")
    return SavedChoice(None, "no rule of the policy is about saved activations")


def _applies(recipe: Recipe | None) -> bool:
    return recipe is not None and recipe.saved is not None and SAVED not in recipe.skip


def saves(policy: Any) -> bool:
    """Whether anything could be saved in eight bits under the policy."""
    chosen = [resolve(rule.recipe) for rule in policy.rules if rule.op == SAVED]
    whole = [resolve(policy.default), *(resolve(r.recipe) for r in policy.rules if r.op is None and r.fqn is None)]
    return any(r is not None and r.saved is not None for r in chosen) or any(map(_applies, whole))


def unmatched_saved(policy: Any, names: Iterable[str]) -> tuple[Unmatched, ...]:
    """The rules about saved activations whose glob matches none of the modules that save any."""
    names = list(names)
    return tuple(Unmatched(i, f"rule {i}: {rule.call()} matches no saved activation", nearest_names(rule.fqn, names))
                 for i, rule in enumerate(policy.rules)
                 if rule.op == SAVED and rule.fqn is not None and not any(map(rule.is_about, names)))
