"""The recipes that a policy can name: the built-in ones, as data, and those that a user registers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from types import MappingProxyType

from quartet.kernels.spec import QuantSpec
from quartet.lowering.recipe import OP_CLASSES, Gemm, Operand, Recipe, Rotation


class PolicyError(ValueError):
    """A policy that cannot be: the message names the nearest legal value and lists what is possible.

    ``path`` leads to the culprit in the plain data of the policy, for example ``("rule", 2, "role")``.
    """

    def __init__(self, message: str, path: tuple[str | int, ...] = ()) -> None:
        super().__init__(message)
        self.path = path

    def under(self, *prefix: str | int) -> PolicyError:
        """The same error, seen from further out in the data."""
        return PolicyError(str(self), (*prefix, *self.path))


def did_you_mean(name: object, legal: Iterable[str]) -> str:
    """``"did you mean 'x'? "`` for the nearest of ``legal``, or the empty string when nothing is near."""
    by_lower = {option.lower(): option for option in legal}
    near = get_close_matches(str(name).lower(), by_lower, n=1)
    return f"did you mean {by_lower[near[0]]!r}? " if near else ""


def unknown(what: str, name: object, legal: Iterable[str], path: tuple[str | int, ...] = ()) -> PolicyError:
    """The error for a name that does not exist."""
    legal = list(legal)
    return PolicyError(f"unknown {what} {name!r}; {did_you_mean(name, legal)}possible: {', '.join(legal)}", path)


def _same(spec: str, rotation: Rotation | None = None) -> Gemm:
    """A GEMM whose operands are quantised alike."""
    operand = Operand(QuantSpec.parse(spec))
    return Gemm(operand, operand, rotation)


def _from_saved(spec: str, rotation: Rotation | None = None) -> Gemm:
    """A backward GEMM: operand a is the gradient, operand b starts from the codes that fprop saved."""
    return Gemm(Operand(QuantSpec.parse(spec)), Operand(QuantSpec.parse(spec), source="saved"), rotation)


_QUARTET_BACKWARD = _from_saved("e2m1/32 e8m0 headroom stochastic", Rotation(32, "random"))
_FP8_TENSOR = "e4m3/tensor fp32 amax nearest"
_FP8_ROW = "e4m3/row fp32 amax_pow2 nearest"

_BUILT_IN: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="quartet",
            summary="MXFP4 throughout: rotated, Gaussian-optimal clip by a guarded deviation, stochastic gradients",
            paper="Quartet, arXiv 2505.14669",
            fprop=_same("e2m1/32 e8m0 quest(guarded,floor) nearest mask", Rotation(32)),
            dgrad=_QUARTET_BACKWARD,
            wgrad=_QUARTET_BACKWARD,
            recompute="gemm",
        ),
        Recipe(
            name="quartet-paper",
            summary="quartet with the centred deviation, bit for bit as released",
            paper="Quartet, arXiv 2505.14669",
            fprop=_same("e2m1/32 e8m0 quest(centred,floor) nearest mask", Rotation(32)),
            dgrad=_QUARTET_BACKWARD,
            wgrad=_QUARTET_BACKWARD,
            recompute="gemm",
        ),
        Recipe(name="bf16", summary="rewrites nothing: every product stays in the model's dtype", skip=()),
        Recipe(
            name="fp8",
            summary="E4M3 with one scale a tensor from its current maximum; backward reads the codes of forward",
            paper="FP8 Formats for Deep Learning, arXiv 2209.05433",
            fprop=_same(_FP8_TENSOR),
            dgrad=_from_saved(_FP8_TENSOR),
            wgrad=_from_saved(_FP8_TENSOR),
        ),
        Recipe(
            name="fp8-rowwise",
            summary="E4M3 with a power-of-two scale for each row of every operand, each quantised from the original",
            paper="TorchAO, arXiv 2507.16099",
            fprop=_same(_FP8_ROW),
            dgrad=_same(_FP8_ROW),
            wgrad=_same(_FP8_ROW),
        ),
    )
}
_registered: dict[str, Recipe] = {}


def recipes() -> Mapping[str, Recipe]:
    """A read-only mapping of name to recipe: the built-in ones in their order, then those registered."""
    return MappingProxyType({**_BUILT_IN, **_registered})


def register(recipe: Recipe) -> Recipe:
    """Let policies name ``recipe``, and return it. Registering the name again replaces a user's own recipe.

    Policies that already exist keep the recipe they were built with.

    Raises:
        PolicyError: the name is taken by a built-in recipe that differs, is reserved, or the recipe skips an op
            class that does not exist.
    """
    check(recipe)
    if recipe.name not in _BUILT_IN:
        _registered[recipe.name] = recipe
    return recipe


def resolve(recipe: str | Recipe | None) -> Recipe | None:
    """The recipe of a name; a Recipe is checked and returned, and None (leave in high precision) stays None.

    Raises:
        PolicyError: unknown name, or not a recipe.
    """
    if recipe is None:
        return None
    if isinstance(recipe, Recipe):
        return check(recipe)
    if not isinstance(recipe, str):
        raise PolicyError(f"a recipe is a name, a Recipe or None, not {type(recipe).__name__} {recipe!r}", ("recipe",))
    if (found := _BUILT_IN.get(recipe) or _registered.get(recipe)) is None:
        raise unknown("recipe", recipe, recipes(), ("recipe",))
    return found


def reference(recipe: str | Recipe | None) -> str | Recipe | None:
    """How a policy stores a recipe: a built-in one by name, any other as the Recipe itself, so that the policy
    means the same in another process and after the name is registered anew."""
    found = resolve(recipe)
    return found.name if found is not None and found.name in _BUILT_IN else found


def check(recipe: Recipe) -> Recipe:
    """Return ``recipe`` if a policy can hold it, otherwise raise PolicyError."""
    if not isinstance(recipe, Recipe):
        raise PolicyError(f"expected a Recipe, got {type(recipe).__name__} {recipe!r}")
    name = recipe.name
    if not isinstance(name, str) or not name.isprintable() or not name.strip():
        raise PolicyError(f"a recipe needs a printable name, got {name!r}")
    if name in ("none", "auto") or name.endswith(".toml"):
        raise PolicyError(f"recipe name {name!r} is reserved: 'none' stands for high precision, 'auto' for a policy "
                          "and '….toml' for a file")
    if recipe != _BUILT_IN.get(name, recipe):
        raise PolicyError(f"recipe {name!r} is built in and differs from this one; give yours another name, "
                          f"for example dataclasses.replace(recipe, name='my-{name}')")
    if not isinstance(recipe.skip, tuple):
        raise PolicyError(f"recipe {name!r}: skip is a tuple of op classes, not {type(recipe.skip).__name__}",
                          ("skip",))
    for op in recipe.skip:
        if op not in OP_CLASSES:
            raise unknown(f"op class in skip of recipe {name!r}:", op, OP_CLASSES, ("skip",))
    return recipe
