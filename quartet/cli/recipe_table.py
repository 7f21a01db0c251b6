"""The recipes as Markdown: what each computes, where it applies, which kernels run it and the op classes where."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from quartet.kernels.spec import RULES_OF_SCALE, QuantSpec
from quartet.lowering import registry
from quartet.lowering.ir import SCALED_BMM, SCALED_MM
from quartet.lowering.ir.ops.grouped import SCALED_GROUPED_MM
from quartet.lowering.recipe.types import OP_CLASSES, ROLES, Gemm, Recipe, Rotation
from quartet.passes.residuals.formats import not_generated as saved_not_generated
from quartet.policy.possible import obstacle
from quartet.recipes import built_in
from quartet.runtime.devices import Target

TARGETS = ("cpu", "sm_80", "sm_89", "sm_90", "sm_100a", "sm_120a")
DTYPE = torch.bfloat16
PRODUCTS = {"grouped": SCALED_GROUPED_MM, "bmm": SCALED_BMM, "attention_qk": SCALED_BMM, "attention_pv": SCALED_BMM}
HEADING = """\
# Recipes

Written by `quartet recipes --markdown` from the recipes and the kernel registry; `make docs` writes it anew, and a test
compares the two. A policy puts a recipe on what it likes: [policies.md](policies.md). What the op classes are:
[op_classes.md](op_classes.md). Own ones: [extending.md](extending.md).

A quantiser reads `element/block scale rule rounding`, the block along the axis that the GEMM contracts; `a · b` where
the operands differ (fprop X · W, dgrad E · W, wgrad E · X), H*n* a Hadamard transform of both in blocks of *n*.
"""
APPLY = """\
## Where they apply

"default" is what a recipe quantises by itself, "by rule" what a rule has to name, – what a rule is refused for.
"""
DEVICES = """\
## Which kernels run them

The products of a linear layer in bf16, of sizes that the kernel takes, by device; other op classes have a table below.
`inductor` dequantises inside of generated code and multiplies in the model's dtype. "none": left alone.
"""
SCALES = """\
## Scale rules

a is the largest magnitude under a scale, M that of the element format, 2^e its power of two (6 and 2^2 of e2m1, 448 and
2^8 of e4m3, 57344 and 2^15 of e5m2). A value is code · scale.
"""
CLASSES = """\
## Which kernels run the op classes

All kernels that a recipe above gets there, for bf16. Products of one matrix with one weight have the kernels of linear
layers, convolutions after unfolding. `cpp`, `triton`, `inductor` and `grouped-mm` multiply dequantised operands in the
model's dtype; `reference` is the quantiser of a table's rows alone, as generated code.
"""


def markdown() -> str:
    """The tables of the built-in recipes and of their scale rules, with headings."""
    recipes = built_in()
    return "\n".join([
        HEADING, "## What they compute\n",
        _table(("recipe", "what it is", "source", *ROLES, "further"), map(_computes, recipes)),
        SCALES, _table(("scale", "rule", "what the scale is"), _rules()),
        APPLY, _table(("recipe", *OP_CLASSES), map(_applies, recipes)),
        DEVICES, _table(("recipe", *TARGETS), (_kernels(recipe) for recipe in recipes if recipe.quantizes)),
        CLASSES, _table(("op class", *TARGETS), (_class(op_class, recipes) for op_class in OP_CLASSES))])


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _rules() -> Iterable[tuple[str, ...]]:
    return ((f"`{scale}`", f"`{rule}`", meaning)
            for scale, rules in RULES_OF_SCALE.items() for rule, meaning in rules.items())


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
    found = kernels_of(recipe, "linear", Target.named(name))
    if None in found.values():
        return _shown(None)  # a layer is quantised in all of its products or in none
    kernels = {role: _shown(kernel) for role, kernel in found.items()}
    if len(kernels) == len(ROLES) and len(set(kernels.values())) == 1:
        return kernels["fprop"]
    return ", ".join(f"{role} {kernel}" for role, kernel in kernels.items())


def _shown(kernel: str | None) -> str:
    return "none" if kernel is None else f"`{kernel}`"


def _class(op_class: str, recipes: Sequence[Recipe]) -> tuple[str, ...]:
    """The kernels of an op class on each target; of how many recipes, where some get none."""
    able = [recipe for recipe in recipes if obstacle(recipe, op_class) is None and recipe.name != "bf16"]

    def cell(name: str) -> str:
        found = [kernels_of(recipe, op_class, Target.named(name)).values() for recipe in able]
        taken = [kernels for kernels in found if None not in kernels]
        names = {kernel for kernels in taken for kernel in kernels if kernel is not None}
        listed = ", ".join(map(_shown, sorted(names, key=_rank))) or "none"
        return listed if len(taken) == len(able) else f"{listed}: {len(taken)} of {len(able)} recipes"

    return (f"`{op_class}`", *map(cell, TARGETS))


def _rank(kernel: str) -> int:
    return registry.NAMES.index(kernel) if kernel in registry.NAMES else len(registry.NAMES)


def kernels_of(recipe: Recipe, op_class: str, target: Target) -> dict[str, str | None]:
    """role → kernel of each product of an op class that a recipe quantises, None for none; with sizes left out."""
    if op_class == "saved":
        return {"saved": None if recipe.saved is None or saved_not_generated(recipe.saved, target) else "inductor"}
    found = {}
    for role in ROLES[:1] if op_class == "embedding" else ROLES:
        gemm: Gemm | None = getattr(recipe, role)
        if gemm is not None and gemm.a.spec is not None and gemm.b.spec is not None:
            found[role] = _kernel(gemm.a.spec, gemm.b.spec, gemm.rotation, op_class, target)
    return found


def _kernel(a: QuantSpec, b: QuantSpec, rotation: Rotation | None, op_class: str, target: Target) -> str | None:
    if op_class == "embedding":
        return None if registry.not_generated(target, b) else "reference"
    size = rotation.n if rotation is not None else 0
    kernel, _ = registry.choose(target, DTYPE, ((a, size), (b, size)), product=PRODUCTS.get(op_class, SCALED_MM))
    return None if kernel is None else kernel.name
