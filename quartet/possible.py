"""Which recipes can be put on which op classes, and why others cannot."""

from __future__ import annotations

from collections.abc import Iterable

from quartet.lowering.recipe import Recipe


def obstacle(recipe: Recipe, op_class: str) -> str | None:
    """None where a rule may put the recipe on the op class, else why it cannot.

    A recipe that changes nothing at all is possible everywhere.
    """
    if not recipe.quantizes and recipe.saved is None:
        return None
    if op_class == "saved":
        return None if recipe.saved is not None else (
            f"recipe {recipe.name!r} quantises matmuls and says nothing of saved activations")
    if not recipe.quantizes:
        return f"recipe {recipe.name!r} is a format of saved activations"
    if op_class == "embedding":
        return _on_rows(recipe)
    return None


def _on_rows(recipe: Recipe) -> str | None:
    """Embeddings are quantised by the recipe's quantiser of W in fprop."""
    spec = recipe.fprop.b.spec if recipe.fprop is not None else None
    if spec is None:
        return f"recipe {recipe.name!r} leaves W in high precision in fprop, and an embedding is nothing else"
    if spec.rule == "delayed":
        return f"recipe {recipe.name!r} scales W by earlier steps, of which an embedding keeps no history"
    return None


def possible(op_class: str, recipes: Iterable[Recipe]) -> list[str]:
    """Names of the recipes, among ``recipes``, that can be put on an op class."""
    return [recipe.name for recipe in recipes if obstacle(recipe, op_class) is None]
