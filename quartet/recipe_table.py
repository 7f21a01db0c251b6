"""The recipes as Markdown: what each computes, where it applies, and which kernels run it on which device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from quartet.kernels.spec import QuantSpec
from quartet.lowering import registry
from quartet.lowering.recipe import OP_CLASSES, ROLES, Gemm, Recipe, Rotation
from quartet.possible import obstacle
from quartet.recipes import built_in
from quartet.runtime.devices import Target

TARGETS = ("cpu", "sm_80", "sm_89", "sm_90", "sm_100a", "sm_120a")
DTYPE = torch.bfloat16
HEADING = """\
# Recipes

Written by `quartet recipes --markdown` from the recipes and the kernel registry; `make docs` writes it anew, and a test
compares the two. A policy puts a recipe on what it likes: [policies.md](policies.md). What the op classes are:
[op_classes.md](op_classes.md). Own ones: [extending.md](extending.md).

A quantiser reads `element/block scale rule rounding`, the block along the axis that the GEMM contracts; `a · b` where
the operands differ (fprop X · W, dgrad E · W, wgrad E · X), H*n* a Hadamard transform of both in blocks of *n*.
"default" is what a recipe quantises by itself, "by rule" what a rule has to name. Kernels are those for bf16 models;
`inductor` dequantises inside of generated code and multiplies in the model's dtype.
"""


def markdown() -> str:
    """The three tables of the built-in recipes, with headings."""
    recipes = built_in()
    return "\n".join([
        HEADING, "## What they compute\n",
        _table(("recipe", "what it is", "source", *ROLES, "further"), map(_computes, recipes)),
        "## Where they apply\n", _table(("recipe", *OP_CLASSES), map(_applies, recipes)),
        "## Which kernels run them\n",
        _table(("recipe", *TARGETS), (_kernels(recipe) for recipe in recipes if recipe.quantizes))])


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _computes(recipe: Recipe) -> tuple[str, ...]:
    further = [f"keeps the {layers} of the layers" for layers in recipe.keep]
    further += [f"Smooth-SwiGLU a {recipe.smooth}"] if recipe.smooth != "none" else []
    if recipe.outliers is not None:
        further.append(f"X beyond the quantiles {1 - recipe.outliers:g} and {recipe.outliers:g} apart")
    further += [f"gradient of W by {recipe.estimator}"] if recipe.estimator != "straight-through" else []
    further += [f"W rounded towards its average, decay {recipe.average:g}"] if recipe.average is not None else []
    further += ["fprop again in backward where its output is needed"] if recipe.recompute == "gemm" else []
    further += [f"saves {recipe.saved}"] if recipe.saved is not None else []
    return (f"`{recipe.name}`", recipe.summary, recipe.paper, *(_gemm(getattr(recipe, role)) for role in ROLES),
            "; ".join(further))


def _gemm(gemm: Gemm | None) -> str:
    if gemm is None:
        return "–"
    saved = " of what fprop quantised" if gemm.b.source == "saved" else ""
    if gemm.a.spec is None or gemm.b.spec is None:
        return f"model's dtype{saved}"
    alike = gemm.a.spec == gemm.b.spec
    text = f"`{gemm.a.spec}`" if alike else f"`{gemm.a.spec}` · `{gemm.b.spec}`"
    for name, rotation in (("", gemm.rotation), ("outer ", gemm.outer)):
        text += f", {name}{_rotation(rotation)}" if rotation is not None else ""
    return text + (", b" + saved if saved else "")


def _rotation(rotation: Rotation) -> str:
    signs = "" if rotation.signs == "none" else ", random signs" if rotation.signs == "random" else ", fixed signs"
    return f"H{rotation.n}{signs}"


def _applies(recipe: Recipe) -> tuple[str, ...]:
    def cell(op_class: str) -> str:
        if obstacle(recipe, op_class) is not None:
            return "–"
        return "by rule" if op_class in recipe.skip else "default"

    return (f"`{recipe.name}`", *map(cell, OP_CLASSES))


def _kernels(recipe: Recipe) -> tuple[str, ...]:
    return (f"`{recipe.name}`", *(_cell(recipe, target) for target in TARGETS))


def _cell(recipe: Recipe, name: str) -> str:
    target = Target.named(name)
    kernels = {role: _kernel(getattr(recipe, role), target) for role in ROLES}
    if len(set(kernels.values())) == 1:
        return kernels["fprop"]
    return ", ".join(f"{role} {kernel}" for role, kernel in kernels.items() if kernel)


def _kernel(gemm: Gemm | None, target: Target) -> str:
    """The kernel of a linear layer's product with the layer's sizes left out; "" in the model's dtype."""
    if gemm is None or gemm.a.spec is None or gemm.b.spec is None:
        return ""
    rotation = gemm.rotation.n if gemm.rotation is not None else 0
    specs: tuple[tuple[QuantSpec, int], tuple[QuantSpec, int]] = (gemm.a.spec, rotation), (gemm.b.spec, rotation)
    kernel, _ = registry.choose(target, DTYPE, specs)
    return f"`{kernel.name}`" if kernel is not None else "none"
