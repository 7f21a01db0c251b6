"""The op classes that a policy can name: the built-in ones, and those that a program registers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from quartet.kernels import extension
from quartet.kernels.extension import ExtensionError
from quartet.lowering.recipe.types import OP_CLASSES, Recipe

OP_GROUPS: Mapping[str, tuple[str, ...]] = {"attention": ("attention_qk", "attention_pv")}
_KIND = "op class"
_registered: dict[str, Callable[[Any], bool]] = {}


def op_classes() -> tuple[str, ...]:
    """All op classes, the built-in ones first."""
    return (*OP_CLASSES, *_registered)


def register_op_class(name: str, predicate: Callable[[Any], bool]) -> None:
    """Let policies name an op class: every product that the predicate is true of, no longer of its built-in class.

    Recipes leave it alone unless a rule names it. Where several are true of a product, the first registered counts.

    Args:
        name: lower-case letters, digits and ``_``.
        predicate: :class:`quartet.passes.sites.Found` → whether it is of this class. The site has the built-in
            ``op_class``, the module's name ``fqn``, the sizes ``m``, ``n``, ``k`` and the forward product itself,
            ``site.products["fprop"].node``. It is asked once a product and graph, before anything is rewritten; a
            condition on a symbolic size becomes a guard of the graph.

    Raises:
        ExtensionError: a name that is taken, or a predicate that is no function.
    """
    if _registered.get(name) is predicate:
        return
    extension.check_name(_KIND, name, (*OP_CLASSES, *OP_GROUPS))
    if not callable(predicate):
        raise ExtensionError(f"op class {name!r}: the predicate is a function of a site, not "
                             f"{type(predicate).__name__}")
    _registered[name] = predicate
    extension.add(_KIND, name, list(_registered).index(name), predicate)


def unregister_op_class(name: str) -> None:
    """Forget a registered op class. Raises ExtensionError where there is none of that name."""
    extension.remove(_KIND, name)
    del _registered[name]


def own_class(site: Any) -> str | None:
    """The registered op class that a product is of, or None. Raises ExtensionError where a predicate fails."""
    for name, predicate in _registered.items():
        try:
            if predicate(site):
                return name
        except Exception as error:
            raise ExtensionError(f"the predicate of op class {name!r} failed on {site.fqn or 'a matmul'} (m={site.m} "
                                 f"n={site.n} k={site.k}): {type(error).__name__}: {error}") from error
    return None


def skips(recipe: Recipe, op_class: str) -> bool:
    """Whether a recipe leaves an op class alone unless a rule names it."""
    return op_class in recipe.skip or op_class in _registered
