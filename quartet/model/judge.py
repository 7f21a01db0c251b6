"""What a compilation says of the model as a whole: rules that are about nothing in it, and that nothing was quantised.

A model can be compiled in many graphs: after graph breaks, block by block, in the buckets of DDP. A rule that is about
nothing in one of them may be about another. So the graphs of a model are taken together, and a rule is judged once all
of them are known, or at once if no module of the model has such a name. Each thing is said once a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from weakref import ref

from torch import nn

from quartet.lowering.recipe.records import MatmulRecord, SavedRecord
from quartet.model.names import Names
from quartet.passes.classify.layers import layers_of
from quartet.passes.naming import module_name
from quartet.policy import Policy, Rule
from quartet.policy.recipes import quantizes, recipes_of
from quartet.policy.saved import unmatched_saved
from quartet.policy.shadowed import shadowed
from quartet.policy.unmatched import Site
from quartet.report.advice import UNPAID, advice, narrower
from quartet.runtime.breaks import now
from quartet.runtime.devices import Target


class Judge:
    """What has been seen of one model under one policy. All texts are for the user; each is given once.

    Attributes:
        records: of its graphs. broken: one of them ended in a graph break. since: when the first was made.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.records: list[MatmulRecord] = []
        self._sites: dict[Site, None] = {}
        self._saved: set[str] = set()
        self._matched: set[int] = set()
        self._parameters: set[str] = set()
        self._said: set[object] = set()
        self._blind = False
        self.broken = False
        self.since = now()

    @property
    def held(self) -> frozenset[str]:
        """Names of the parameters that graphs hold."""
        return frozenset(self._parameters)

    def add(self, names: Names, records: Sequence[MatmulRecord], saved: Sequence[SavedRecord]) -> None:
        """One more graph of the model; without records it came from a cache, and what is in it is not known."""
        self.records += records
        self._blind |= bool(names.weights and not records)
        self.broken |= not names.unbroken
        self._saved.update(record.fqn for record in saved)
        self._parameters.update(map(names.full, names.weights.values()))
        layers, policy = layers_of(r.fqn for r in records), self.policy.at(names.place)
        sites = [(r.op_class, r.fqn, r.m, r.n, r.k, layers.get(r.fqn)) for r in records if r.role == "fprop"]
        self._sites.update(dict.fromkeys(sites))
        about_none = {u.rule for u in (*policy.unmatched(sites), *unmatched_saved(policy, [r.fqn for r in saved]))}
        self._matched |= set(range(len(policy.rules))) - about_none

    def unmatched(self, names: Names, known: bool = False) -> Iterator[str]:
        """The rules that a later one leaves nothing; those that are about nothing, as far as that is known after the
        graph of ``names``; ``known``: no other graph comes."""
        policy = self.policy.at(names.place)
        for i, text in shadowed(self.policy.rules):
            if ("shadowed", i) not in self._said:
                self._said.add(("shadowed", i))
                yield f"quartet policy: {text}"
        layers = sorted(map(module_name, names.matrices))
        found = [*(policy.unmatched(list(self._sites), layers) if self._sites else ()),
                 *(unmatched_saved(policy, self._saved) if self._saved else ())]
        for one in found:
            told = one.rule in self._said or one.rule in self._matched or ("shared", one.rule) in self._said
            if not told and (known or not self._may_come(policy.rules[one.rule], names)):
                self._said.add(one.rule)
                yield f"quartet policy: {one}"

    def _may_come(self, rule: Rule, names: Names) -> bool:
        """Whether another graph of the model may have what the rule is about."""
        whole = names.complete or (names.matrices and names.matrices <= self._parameters)
        if whole and not self._blind:
            return False
        if rule.fqn is None:
            return True
        covered = {module_name(parameter) for parameter in self._parameters}
        left = names.known - covered
        return any(fnmatchcase(name, rule.fqn) for whole in left for name in _tails(whole, names.place))

    def shared(self, names: Names, records: Sequence[MatmulRecord]) -> Iterator[str]:
        """The rules that tell modules apart whose code is one: of a block that is compiled by itself, or has a graph
        break, or is a ``nested_compile_region``."""
        for fqn in dict.fromkeys(r.fqn for r in records):
            whole, others = module_name(names.full(fqn)), names.others(fqn)
            for i, rule in enumerate(self.policy.rules):
                hit = rule.fqn is None or _hits(rule, whole, names.place)
                apart = [other for other, place in others if rule.fqn is not None and hit != _hits(rule, other, place)]
                if apart and ("shared", i) not in self._said:
                    self._said.add(("shared", i))
                    yield (f"quartet policy: rule {i}: {rule.call()} tells {whole!r} from {apart[0]!r}, and one piece "
                           f"of code can serve all {len(others) + 1} modules like them, each as {whole!r}. Compile the "
                           "model in one graph without regions, or write the rule for all of them")

    def nothing(self, names: Names, target: Target) -> tuple[str, bool] | None:
        """Where the policy quantises and nothing was quantised on a device: a text for the user, and whether that is as
        it should be, since nothing would pay."""
        matmuls = [r for r in self.records if r.op_class != "embedding"]
        recipes = {recipe.name: recipe for recipe in recipes_of(self.policy)}
        wanted = [r for r in matmuls if r.recipe in recipes and getattr(recipes[r.recipe], r.role) is not None]
        if "nothing" in self._said or self._blind or not names.unbroken or any(r.lowered for r in self.records):
            return None
        if not wanted and not (matmuls and names.plain and quantizes(self.policy)):
            return None
        self._said.add("nothing")
        head = f"quartet: none of the {len(matmuls)} matmuls of the model is quantised"
        if not wanted:
            return (f"{head}: a layer's weight, {names.plain!r}, is a plain tensor, and weights are told from "
                    "activations by being an nn.Parameter. Give the layers parameters: nn.Parameter(tensor)"), False
        first = wanted[0]
        text = f"{head}. The first, {first.fqn or 'a matmul'} ({first.dtype}): {first.reason}"
        if self.policy.where_it_pays and first.reason.startswith(UNPAID):
            return f"{text}. {advice(matmuls, target)}", not narrower(first, target)
        return f"{text}. quartet.explain(model, …) shows all of them", False


def _hits(rule: Rule, whole: str, place: str) -> bool:
    """Whether a rule's glob matches a module by its name in the whole model, or from what was compiled."""
    return any(fnmatchcase(name, str(rule.fqn)) for name in (whole, whole.removeprefix(f"{place}.")))


def _tails(name: str, place: str) -> list[str]:
    """The names by which a rule can be about a module: where parts are compiled by themselves, those from any part."""
    return [name, *(name.split(".", i)[i] for i in range(1, name.count(".") + 1))] if place else [name]


_judges: dict[tuple[int, str], tuple[ref[nn.Module], Judge]] = {}


def judge_of(policy: Policy, names: Names) -> Judge:
    """The judge of the model that a graph belongs to; a new one where no module is known."""
    model = names.model
    if model is None:
        return Judge(policy)
    for key in [key for key, (owner, _) in _judges.items() if owner() is None]:
        del _judges[key]
    return _judges.setdefault((id(model), policy.digest()), (ref(model), Judge(policy)))[1]
