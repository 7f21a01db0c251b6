"""Which matmul gets which recipe: a default, and rules of which the last that matches wins.

    policy = Policy("quartet").on("lm_head", None).on("*.down_proj", "bf16", role="wgrad", shape="k >= 4096")

A policy is frozen plain data: it compares, hashes, prints as Python that reads back equal, and goes to and from TOML.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from types import EllipsisType
from typing import Any

from quartet.kernels.files import expanded
from quartet.lowering.recipe.depth import Layer, is_within
from quartet.lowering.recipe.op_classes import OP_GROUPS, op_classes, skips
from quartet.lowering.recipe.resolution import Choice, Resolution, SavedChoice
from quartet.lowering.recipe.types import ROLES, Gemm, Recipe
from quartet.policy import toml as policy_toml
from quartet.policy.possible import weighed
from quartet.policy.rules import Rule
from quartet.policy.saved import SAVED, saved_choice
from quartet.policy.unmatched import Site, Unmatched, explain_unmatched
from quartet.recipes import PolicyError, did_you_mean, recipes, reference, resolve, unknown

_RULE_KEYS = ("pattern", "op", "recipe", "role", "shape", "layers")
_POLICY_KEYS = ("default", "where_it_pays", "alternatives", "rule", "recipe")
AUTO = "auto"


@dataclass(frozen=True, repr=False)
class Policy:
    """A default recipe and rules on top of it, each decided anew for every matmul and role; the last match wins.

    Args:
        default: recipe name, Recipe, or None to leave everything in high precision that no rule names. The op
            classes that the recipe skips (``lm_head``, attention…) stay in high precision.
        rules: normally added with ``on``.
        where_it_pays: on a GPU, leave to the default recipe only the products that it is predicted to make faster
            (``quartet.lowering.rates``), experts among them; what a rule names is done as it says.
        alternatives: recipes that are weighed beside the default, with ``where_it_pays``: a layer gets the one that is
            predicted to be the fastest. What is not weighed, as all of a CPU, gets the default.

    Raises:
        PolicyError: unknown recipe, or two different recipes of one name; alternatives of a default that is not
            weighed, or that are none.
    """

    default: str | Recipe | None = "quartet"
    rules: tuple[Rule, ...] = ()
    where_it_pays: bool = False
    alternatives: tuple[str | Recipe, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.where_it_pays, bool):
            raise PolicyError(f"where_it_pays is True or False, not {self.where_it_pays!r}", ("where_it_pays",))
        try:
            object.__setattr__(self, "default", reference(self.default))
        except PolicyError as error:
            raise PolicyError(str(error), ("default",)) from None
        if self.where_it_pays and self.default is None:
            raise PolicyError("where_it_pays weighs the default recipe, and the default is None", ("where_it_pays",))
        self._check_alternatives()
        rules = tuple(self.rules) if isinstance(self.rules, Iterable) else (self.rules,)
        for rule in rules:
            if not isinstance(rule, Rule):
                raise PolicyError(f"rules are made by Policy.on(…), got {type(rule).__name__} {rule!r}")
        object.__setattr__(self, "rules", rules)
        own: dict[str, Recipe] = {}
        for recipe in self._own_recipes():
            if own.setdefault(recipe.name, recipe) != recipe:
                raise PolicyError(f"two different recipes of this policy are called {recipe.name!r}; rename one with "
                                  "dataclasses.replace(recipe, name=…)", ("recipe",))

    def _check_alternatives(self) -> None:
        if isinstance(self.alternatives, str) or not isinstance(self.alternatives, Iterable):
            raise PolicyError(f"alternatives are recipes, such as ('fp8',), not {self.alternatives!r}",
                              ("alternatives",))
        try:
            others = tuple(reference(recipe) for recipe in self.alternatives)
        except PolicyError as error:
            raise PolicyError(str(error), ("alternatives",)) from None
        object.__setattr__(self, "alternatives", others)
        if others and not self.where_it_pays:
            raise PolicyError("alternatives are weighed beside the default: where_it_pays=True goes with them",
                              ("alternatives",))
        known = [resolve(recipe) for recipe in (self.default, *others)]
        for i, recipe in enumerate(known):
            if others and (recipe is None or not recipe.quantizes or recipe in known[:i]):
                said = "is there twice" if recipe in known[:i] else "quantises no matmul"
                raise PolicyError(f"recipe {'none' if recipe is None else recipe.name!r} {said}: alternatives and the "
                                  "default are recipes of matmuls, each another one", ("alternatives",))

    def on(self, pattern: str | None = None, recipe: str | Recipe | None | EllipsisType = ..., *,
           op: str | None = None, role: str | tuple[str, ...] | None = None, shape: str | None = None,
           layers: str | None = None) -> Policy:
        """This policy with one more rule, which wins over the earlier ones.

        Args:
            pattern: an op class (``"lm_head"``), the group ``"attention"``, or a glob over module names
                (``"*.down_proj"``, ``"layers.0.*"``). ``"fqn:lm_head"`` is the module of that name.
                With ``op="saved"`` the module that makes what is saved (see ``quartet.policy.saved``).
            recipe: name, Recipe, or None for high precision.
            op: op class or group; beside a glob both have to match.
            role: ``"fprop"`` (or ``"forward"``), ``"dgrad"``, ``"wgrad"``, a tuple of them, or None for all.
            shape: predicate over m (tokens), n (out), k (in) of the matmul, ``"k >= 4096 and n % 32 == 0"``.
            layers: of a stack, ``"last 15%"`` or ``"first 2"``; a module's layer is the first number in its name.

        Raises:
            PolicyError: something that does not exist; names the nearest that does.
        """
        if isinstance(recipe, EllipsisType):
            raise PolicyError(f"on({'' if pattern is None else repr(pattern)}) needs a recipe: one of "
                              f"{', '.join(recipes())}, a Recipe, or None to leave the matmul in high precision",
                              ("recipe",))
        fqn = pattern
        if isinstance(pattern, str):
            if pattern in (*op_classes(), *OP_GROUPS):
                if op not in (None, pattern):
                    raise PolicyError(f"the rule names two op classes, {pattern!r} and op={op!r}; give one, or "
                                      f"'fqn:{pattern}' for the module of that name", ("op",))
                fqn, op = None, pattern
            else:
                fqn = pattern.removeprefix("fqn:")
        return replace(self, rules=(*self.rules, Rule(recipe, fqn, op, role, shape, layers)))

    def at(self, place: str) -> Policy:
        """This policy for a part that is compiled by itself and is called ``place`` in a larger model: rules may name
        what is in it from the one or from the other."""
        return replace(self, rules=tuple(replace(rule, place=place) for rule in self.rules))

    def candidates(self) -> tuple[Policy, ...]:
        """The policies with one recipe as default that are weighed against each other, this one's default first."""
        return tuple(replace(self, default=recipe, alternatives=()) for recipe in (self.default, *self.alternatives))

    def candidate(self, name: str | None) -> Policy:
        """The one of :meth:`candidates` whose default is called so; this policy where there is none."""
        return next((one for one in self.candidates()[1:] if _name(one.default) == name), self)

    def resolve(self, op_class: str, fqn: str | None, m: Any, n: Any, k: Any,
                layer: Layer | None = None, aside: Mapping[str, str] | None = None) -> Resolution:
        """What happens to one matmul ``[m, k] · [n, k]ᵀ``.

        A backward GEMM that starts from saved codes needs fprop quantised the way its recipe expects. Where the
        rules part the two, its operand b is quantised from the original tensor, and the reason says so.

        Args:
            op_class: one of ``op_classes()``.
            fqn: name of the module, or None if it is not known (then no glob matches).
            m: tokens, int or symbolic.
            n: output features.
            k: input features.
            layer: (index, how many there are) of the layer that the module is in, or None if that is not known.
            aside: role → why its product stays in high precision unless a rule names the op class or the module.
        """
        if op_class not in op_classes():
            raise unknown("op class", op_class, op_classes())
        matching = [(i, rule) for i, rule in enumerate(self.rules) if rule.matches(op_class, fqn, m, n, k, layer)]
        why = aside or {}
        choices = {role: self._choose(role, op_class, matching, layer, why.get(role, "")) for role in ROLES}
        for role in ("dgrad", "wgrad"):
            choices[role] = choices[role].detached(choices["fprop"])
        return Resolution(**choices)

    def _choose(self, role: str, op_class: str, matching: list[tuple[int, Rule]], layer: Layer | None,
                aside: str) -> Choice:
        i: int | None
        for i, rule in reversed(matching):
            if role in (rule.roles or ()) and not (aside and rule.is_general):
                recipe, why = resolve(rule.recipe), f"rule {i}: {rule.call()}"
                break
        else:
            i, recipe = None, resolve(self.default)
            why = "default None: high precision" if recipe is None else f"default recipe {recipe.name!r}"
            covered = self.where_it_pays and recipe is not None and weighed(recipe, op_class)
            if recipe is not None and skips(recipe, op_class) and not covered:
                why = f"recipe {recipe.name!r} leaves {op_class} in high precision unless a rule names it"
                recipe = None
            elif recipe is not None and layer is not None:
                kept = next((text for text in recipe.keep if is_within(layer, text)), None)
                if kept is not None:
                    why = (f"recipe {recipe.name!r} keeps the {kept} of the layers in high precision unless a rule "
                           f"names them; this is layer {layer[0]} of {layer[1]}")
                    recipe = None
            if aside and recipe is not None and getattr(recipe, role) is not None:
                why, recipe = f"{aside}: in high precision unless a rule names it", None
        gemm: Gemm | None = getattr(recipe, role) if recipe is not None else None
        if recipe is not None and gemm is None:
            why += f", which leaves {role if recipe.quantizes else 'everything'} in high precision"
        return Choice(gemm, recipe, why, i)

    def resolve_saved(self, fqn: str | None) -> SavedChoice:
        """What happens to the tensors that a module leaves for backward beside the operands of its products."""
        return saved_choice(self, fqn)

    def unmatched(self, sites: Iterable[Site], known: Iterable[str] = ()) -> tuple[Unmatched, ...]:
        """The rules that are about none of the matmuls ``(op_class, fqn, m, n, k)``, for a warning; ``known``: other
        modules that they could have meant."""
        sites, others = list(sites), list(known)
        return tuple(explain_unmatched(i, rule, sites, others) for i, rule in enumerate(self.rules)
                     if rule.op != SAVED and not any(rule.matches(*site) for site in sites))

    def digest(self) -> str:
        """32 hex digits that change with anything the policy says, the content of its recipes included."""
        def content(recipe: str | Recipe | None) -> Any:
            found = resolve(recipe)
            return None if found is None else asdict(found)

        parts = [content(self.default), self.where_it_pays, [content(recipe) for recipe in self.alternatives]]
        parts += [[rule.fqn, rule.op, rule.roles, rule.shape, rule.layers, content(rule.recipe)] for rule in self.rules]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def key(self) -> str:
        """:meth:`digest`, and in which places of a larger model its globs look for modules."""
        return repr((self.digest(), [rule.place for rule in self.rules if rule.fqn is not None]))

    @classmethod
    def coerce(cls, value: object) -> Policy:
        """A policy from whatever a user may pass: a Policy, a recipe name or Recipe, the path of a ``.toml`` file,
        or the plain data of ``to_dict``. Raises PolicyError."""
        if isinstance(value, Policy):
            return value
        if isinstance(value, Recipe):
            return cls(value)
        if isinstance(value, os.PathLike):
            return cls.from_toml(value)
        if isinstance(value, Mapping):
            return cls.from_dict(value)
        if not isinstance(value, str):
            raise PolicyError("a policy is a Policy, a recipe name, a Recipe, the path of a .toml file or a dict, not "
                              f"{type(value).__name__} {value!r}")
        if value.endswith(".toml"):
            return cls.from_toml(value)
        if value == AUTO:
            return cls("quartet", where_it_pays=True, alternatives=("fp8",))
        if value not in recipes():
            raise PolicyError(f"unknown policy {value!r}; {did_you_mean(value, (AUTO, *recipes()))}possible: "
                              f"{', '.join((AUTO, *recipes()))}, or the path of a .toml file")
        return cls(value)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: strings, lists and dicts, with a user's recipes in full under ``"recipe"``."""
        data: dict[str, Any] = {"default": _name(self.default)}
        if self.where_it_pays:
            data["where_it_pays"] = True
        if self.alternatives:
            data["alternatives"] = [_name(recipe) for recipe in self.alternatives]
        rules = [{key: list(item) if isinstance(item, tuple) else _name(item) for key, item in rule.to_dict().items()}
                 for rule in self.rules]
        own = {recipe.name: policy_toml.recipe_to_dict(recipe) for recipe in self._own_recipes()}
        return data | ({"rule": rules} if rules else {}) | ({"recipe": own} if own else {})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Policy:
        """The inverse of ``to_dict``; recipes may also be None or a Recipe. Raises PolicyError with a ``path``."""
        data = policy_toml.check_table("the policy", data, _POLICY_KEYS)
        own = {name: policy_toml.within(("recipe", name), policy_toml.recipe_from_dict, name, table)
               for name, table in policy_toml.typed(data, "recipe", Mapping, "a table of recipes of your own, and the "
                                                    "recipe of all that no rule names is the key 'default'").items()}

        def named(recipe: Any) -> Any:
            return None if recipe == "none" else own.get(recipe, recipe) if isinstance(recipe, str) else recipe

        others = policy_toml.typed(data, "alternatives", list, "a list of recipes")
        policy = cls(named(data.get("default", cls.default)), where_it_pays=data.get("where_it_pays", False),
                     alternatives=tuple(map(named, others)))
        for i, table in enumerate(policy_toml.typed(data, "rule", list, "a list of rules, [[rule]] in TOML")):
            rule = dict(policy_toml.within(("rule", i), policy_toml.check_table, f"rule {i}", table, _RULE_KEYS))
            if "recipe" in rule:
                rule["recipe"] = named(rule["recipe"])
            if isinstance(rule.get("role"), list):
                rule["role"] = tuple(rule["role"])
            policy = policy_toml.within(("rule", i), policy.on, **rule)
        return policy

    def to_toml(self) -> str:
        """TOML text; ``Policy.from_toml`` reads it back equal, also where the user's recipes are not registered."""
        return policy_toml.write(self.to_dict())

    @classmethod
    def from_toml(cls, source: str | os.PathLike[str]) -> Policy:
        """Read a policy from TOML text, or from a file: a path object or a string that ends in ``.toml``.

        Raises:
            PolicyError: no such file, malformed TOML, unknown key or value; with the file and the line.
        """
        text, where, file = source, "the policy text", False
        if not isinstance(source, str) or (source.endswith(".toml") and "\n" not in source):
            where, file = os.fspath(source), True
            try:
                text = expanded(where).read_text(encoding="utf-8")
            except FileNotFoundError as error:
                raise PolicyError(f"cannot read policy file {where!r}: {error.strerror}") from None
            except (OSError, UnicodeDecodeError) as error:
                raise PolicyError(f"cannot read policy file {where!r}: {error}") from None
        text = str(text)
        try:
            data = policy_toml.read(text, where)
        except PolicyError as error:
            if file or "\n" in text or "=" in text:
                raise
            raise PolicyError(f"{error}; to read a file give a path object, or a string that ends in .toml") from None
        try:
            return cls.from_dict(data)
        except PolicyError as error:
            line = policy_toml.line_of(text, error.path)
            raise PolicyError(f"{where}, line {line}: {error}", error.path) from None

    def _own_recipes(self) -> list[Recipe]:
        used = [self.default, *self.alternatives, *(rule.recipe for rule in self.rules)]
        return [recipe for recipe in used if isinstance(recipe, Recipe)]

    def _calls(self, full: bool) -> str:
        def shown(recipe: str | Recipe | None) -> str | Recipe | None:
            return recipe.name if isinstance(recipe, Recipe) and not full else recipe

        weighed = ", where_it_pays=True" if self.where_it_pays else ""
        others = f", alternatives={tuple(map(shown, self.alternatives))!r}" if self.alternatives else ""
        return "".join([f"Policy({shown(self.default)!r}{weighed}{others})",
                        *(f".{rule.call(full)}" for rule in self.rules)])

    def __repr__(self) -> str:
        return self._calls(full=True)

    def __str__(self) -> str:
        return self._calls(full=False)


def _name(value: Any) -> Any:
    """How plain data refers to a recipe; other values stay."""
    return "none" if value is None else value.name if isinstance(value, Recipe) else value
