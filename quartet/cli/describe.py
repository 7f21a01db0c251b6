"""The recipes, as ``quartet recipes`` lists them and prints one in full."""

from __future__ import annotations

from collections.abc import Mapping

from quartet.lowering.recipe.types import ROLES, Gemm, Operand, Recipe, Rotation

EQUATIONS = {
    "fprop": ("Y = X · Wᵀ", "in", "X", "W"),
    "dgrad": ("gX = E · W", "out", "E", "W"),
    "wgrad": ("gW = Eᵀ · X", "tokens", "E", "X"),
}


def listing(known: Mapping[str, Recipe]) -> str:
    """A line a recipe, and its paper."""
    width = max(map(len, known))
    lines = ((recipe.name, recipe.summary, recipe.paper) for recipe in known.values())
    return "\n".join(f"{name:<{width}}  {summary}" + (f"\n{'':<{width}}  {paper}" if paper else "")
                     for name, summary, paper in lines)


def as_data(recipe: Recipe) -> dict[str, object]:
    """A recipe's name, words, and its three GEMMs as text, JSON-serialisable."""
    gemms = {role: None if (gemm := getattr(recipe, role)) is None else {
        "a": _operand(gemm.a), "b": _operand(gemm.b), "rotation": _rotation(gemm.rotation)} for role in ROLES}
    return {"name": recipe.name, "summary": recipe.summary, "paper": recipe.paper, **gemms, "skips": list(recipe.skip)}


def describe_recipe(recipe: Recipe) -> str:
    """The three GEMMs of a recipe in full, one operand a line."""
    lines = [recipe.name, *(f"  {text}" for text in (recipe.summary, recipe.paper) if text)]
    for role in ROLES:
        equation, axis, a, b = EQUATIONS[role]
        gemm: Gemm | None = getattr(recipe, role)
        lines.append(f"{role}   {equation:<12} contracts {axis}")
        if gemm is None:
            lines.append("  in the model's dtype")
            continue
        lines += [f"  {a:<9} {_operand(gemm.a)}", f"  {b:<9} {_operand(gemm.b)}",
                  f"  {'rotation':<9} {_rotation(gemm.rotation)}"]
    lines.append(f"skips    {', '.join(recipe.skip) or 'no op class'}")
    lines.append("weights  " + ("kept packed for backward" if recipe.keep_weights else "quantised again in backward"))
    if recipe.recompute == "gemm":
        lines.append("output   computed again in backward from the saved codes")
    if recipe.remembers:
        lines.append(f"history  {recipe.history}")
    if recipe.smooth != "none":
        lines.append(f"smooth   gated activations, per {recipe.smooth}")
    if recipe.saved is not None:
        lines.append(f"saved    {recipe.saved}")
    return "\n".join(lines)


def _operand(operand: Operand) -> str:
    if operand.spec is None:
        return "in the model's dtype"
    return f"{operand.spec}{', from the saved codes of fprop' if operand.source == 'saved' else ''}"


def _rotation(rotation: Rotation | None) -> str:
    if rotation is None:
        return "none"
    if isinstance(rotation.signs, str):
        return f"H{rotation.n}" + (" with fresh random signs" if rotation.signs == "random" else "")
    return f"H{rotation.n} with fixed signs {''.join('+' if s > 0 else '-' for s in rotation.signs)}"
