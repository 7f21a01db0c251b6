"""One rule of a policy: the matmuls that it is about, and what they get."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from quartet.kernels.spec import SpecError
from quartet.lowering.recipe.depth import Layer, is_within, normalise_depth
from quartet.lowering.recipe.op_classes import OP_GROUPS, op_classes, skips
from quartet.lowering.recipe.types import ROLES, Recipe
from quartet.passes.naming import module_name
from quartet.policy.possible import obstacle, possible
from quartet.policy.predicate import holds, normalise
from quartet.policy.saved import check_rule
from quartet.recipes import PolicyError, recipes, reference, resolve, unknown

ROLE_ALIASES: Mapping[str, str] = {"forward": "fprop"}


@dataclass(frozen=True)
class Rule:
    """One rule: the matmuls that it is about, and the recipe that they get. A condition that is None always holds.

    Args:
        recipe: name, Recipe, or None to leave the matmul in high precision.
        fqn: glob over the fully qualified module name (``fnmatch``; without a wildcard it is the exact name).
        op: op class of ``op_classes()`` or group of ``OP_GROUPS``.
        roles: the GEMMs that it decides: ``fprop`` (or ``forward``), ``dgrad``, ``wgrad``, several, or None for all.
        shape: predicate over m, n, k (see ``quartet.policy.predicate``).
        layers: ``"last 15%"``, ``"first 2"``: layers of a stack, told by the numbers in module names.
        place: of the compiled module in a larger model, from which the rule may name its modules too (``Policy.at``).

    Raises:
        PolicyError: something that does not exist; names the nearest that does.
    """

    recipe: str | Recipe | None
    fqn: str | None = None
    op: str | None = None
    roles: str | tuple[str, ...] | None = None
    shape: str | None = None
    layers: str | None = None
    place: str = field(default="", repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "recipe", reference(self.recipe))
        object.__setattr__(self, "roles", _roles(self.roles))
        if self.op is not None and self.op not in (*op_classes(), *OP_GROUPS):
            raise unknown("op class", self.op, (*op_classes(), *OP_GROUPS), ("op",))
        if self.fqn is not None and (not isinstance(self.fqn, str) or not self.fqn):
            raise PolicyError(f"a pattern is an op class or a glob over module names, not {self.fqn!r}", ("pattern",))
        if self.shape is not None:
            object.__setattr__(self, "shape", normalise(self.shape))
        if self.layers is not None:
            try:
                normalise_depth(self.layers)
            except SpecError as error:
                raise PolicyError(str(error), ("layers",)) from None
        check_rule(self)
        recipe, roles = resolve(self.recipe), self.roles or ()
        for op in () if self.op is None else OP_GROUPS.get(self.op, (self.op,)):
            if recipe is not None and (reason := obstacle(recipe, op, roles)) is not None:
                others = possible(op, recipes().values(), roles)
                raise PolicyError(f"{reason}; possible on op class {op!r}: {', '.join(others)}, or None", ("recipe",))

    def matches(self, op_class: str, fqn: str | None, m: Any, n: Any, k: Any, layer: Layer | None = None) -> bool:
        """Whether the rule is about this matmul. A rule that names neither an op class nor a module leaves the op
        classes alone that its recipe skips; one that names layers is about none whose layer is not known."""
        if self.layers is not None and (layer is None or not is_within(layer, self.layers)):
            return False
        return self._names(op_class, fqn) and (self.shape is None or holds(self.shape, m, n, k))

    @property
    def is_general(self) -> bool:
        """Whether it quantises and names neither an op class nor a module."""
        return self.op is None and self.fqn is None and resolve(self.recipe) is not None

    def _names(self, op_class: str, fqn: str | None) -> bool:
        if self.op is not None and op_class not in OP_GROUPS.get(self.op, (self.op,)):
            return False
        if self.fqn is not None:
            return bool(fqn) and self.is_about(fqn or "")
        recipe = resolve(self.recipe)
        return self.op is not None or recipe is None or not skips(recipe, op_class)

    def is_about(self, module: str) -> bool:
        """Whether the glob matches a module's name, in what was compiled or in the larger model."""
        names = (module, module_name(f"{self.place}.{module}")) if self.place else (module,)
        return self.fqn is None or any(fnmatchcase(name, self.fqn) for name in names)

    def to_dict(self) -> dict[str, Any]:
        """The arguments of ``Policy.on`` that make this rule, those at their default left out."""
        data: dict[str, Any] = {}
        if self.fqn is not None:
            plain = self.fqn not in (*op_classes(), *OP_GROUPS) and not self.fqn.startswith("fqn:")
            data["pattern"] = self.fqn if plain else f"fqn:{self.fqn}"
        if self.op is not None:
            data["op"] = self.op
        data["recipe"] = self.recipe
        if self.roles != ROLES:
            data["role"] = self.roles[0] if self.roles is not None and len(self.roles) == 1 else self.roles
        for key in ("shape", "layers"):
            if getattr(self, key) is not None:
                data[key] = getattr(self, key)
        return data

    def call(self, full: bool = False) -> str:
        """The rule as it is written, ``on('*.down_proj', 'bf16', role='wgrad')``; ``full`` spells out a user's
        Recipe instead of its name."""
        data = self.to_dict()
        first = data.pop("pattern", None) or data.pop("op", None)
        recipe = data.pop("recipe")
        value = repr(recipe if full or not isinstance(recipe, Recipe) else recipe.name)
        head = [f"recipe={value}"] if first is None else [repr(first), value]
        return f"on({', '.join([*head, *(f'{key}={item!r}' for key, item in data.items())])})"


def _roles(roles: object) -> tuple[str, ...]:
    """Canonical roles: in the order of ROLES, without aliases."""
    given = ROLES if roles is None else (roles,) if isinstance(roles, str) else roles
    if not isinstance(given, tuple | list | set | frozenset) or not given:
        raise PolicyError(f"role is one of {', '.join(ROLES)}, a tuple of them, or None for all, not {roles!r}",
                          ("role",))
    named = set()
    for role in given:
        if role == "backward":
            raise PolicyError("role 'backward' is two products: role=('dgrad', 'wgrad')", ("role",))
        if role not in (*ROLES, *ROLE_ALIASES):
            raise unknown("role", role, (*ROLES, *ROLE_ALIASES), ("role",))
        named.add(ROLE_ALIASES.get(role, role))
    return tuple(role for role in ROLES if role in named)
