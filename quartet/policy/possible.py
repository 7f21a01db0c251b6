"""Which recipes can be put on which op classes, and why others cannot."""

from __future__ import annotations

from collections.abc import Iterable

from quartet.lowering.recipe.types import OP_CLASSES, ROLES, WEIGHED, Recipe

ONE_WEIGHT = ("linear", "lm_head", "router", "conv")  # products of one matrix X with one parameter W


def obstacle(recipe: Recipe, op_class: str, roles: Iterable[str] = ROLES) -> str | None:
    """None where a rule may put the recipe on these products of the op class, else why it cannot.

    A recipe that changes nothing at all is possible everywhere.
    """
    if not recipe.quantizes and recipe.saved is None:
        return None
    if op_class == "saved":
        return None if recipe.saved is not None else (
            f"recipe {recipe.name!r} quantises matmuls and says nothing of saved activations")
    if not recipe.quantizes:
        return f"recipe {recipe.name!r} is a format of saved activations"
    if op_class == "embedding" and "fprop" not in roles:
        return (f"an embedding is quantised in forward only, and role={', '.join(map(repr, roles))} leaves that out; "
                "give role='fprop' or no role")
    if op_class == "embedding" and (reason := _on_rows(recipe)) is not None:
        return reason
    return _without_one_weight(recipe, op_class) if "fprop" in roles else None


def weighed(recipe: Recipe, op_class: str) -> bool:
    """Whether a default that quantises only what pays covers an op class that its recipe skips."""
    return op_class in WEIGHED and obstacle(recipe, op_class) is None


def _on_rows(recipe: Recipe) -> str | None:
    """Embeddings are quantised by the recipe's quantiser of W in fprop."""
    spec = recipe.fprop.b.spec if recipe.fprop is not None else None
    if spec is None:
        return f"recipe {recipe.name!r} leaves W in high precision in fprop, and an embedding is nothing else"
    if spec.rule == "delayed":
        return f"recipe {recipe.name!r} scales W by earlier steps, of which an embedding keeps no history"
    return None


def _without_one_weight(recipe: Recipe, op_class: str) -> str | None:
    """What some recipes do beside quantising, they do to one matrix X and one parameter W."""
    if op_class in ONE_WEIGHT or op_class not in OP_CLASSES:
        return None
    features = [text for wanted, text in (
        (recipe.outliers is not None, "multiplies the outliers of X apart"),
        (recipe.estimator == "dge", "takes the gradient of W by the slope of its quantiser"),
        (recipe.average is not None, "rounds W toward its moving average"),
    ) if wanted and recipe.fprop is not None]
    return f"recipe {recipe.name!r} {' and '.join(features)}, of which {_WHAT[op_class]}" if features else None


_WHAT = {
    "embedding": "an embedding, which gathers, has nothing",
    "grouped": "a product with the weights of several experts has nothing",
    **dict.fromkeys(("attention_qk", "attention_pv", "bmm"), "a product of two activations has nothing"),
}


def possible(op_class: str, recipes: Iterable[Recipe], roles: Iterable[str] = ROLES) -> list[str]:
    """Names of the recipes, among ``recipes``, that can be put on these products of an op class."""
    return [recipe.name for recipe in recipes if obstacle(recipe, op_class, roles) is None]
