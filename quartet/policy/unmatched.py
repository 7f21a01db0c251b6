"""Rules of a policy that are about nothing in the model: why, and what they could have meant."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

Site = tuple[Any, ...]  # op class, FQN, m, n, k and, where it is known, the layer


@dataclass(frozen=True)
class Unmatched:
    """A rule that matched nothing: its index, why, and the nearest names that it could have meant."""

    rule: int
    reason: str
    nearest: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.reason}; nearest: {', '.join(map(repr, self.nearest))}" if self.nearest else self.reason


def explain_unmatched(i: int, rule: Any, sites: list[Site], known: Sequence[str] = ()) -> Unmatched:
    """Why the rule, a ``quartet.policy.Rule``, matches none of the matmuls; ``known``: names of other modules."""
    reason = f"rule {i}: {rule.call()} matches no matmul"
    named = [site for site in sites if rule._names(site[0], site[1])]
    if named:
        return Unmatched(i, f"{reason}: none of the {len(named)} that it names satisfies {rule.shape!r}", ())
    if rule.fqn is not None and any(rule.is_about(fqn or "") for _, fqn, *_ in sites):
        return Unmatched(i, f"{reason}: no module like {rule.fqn!r} is of op class {rule.op!r}", ())
    if rule.fqn is None:
        classes = ", ".join(sorted({op_class for op_class, *_ in sites})) or "none"
        return Unmatched(i, f"{reason}: op classes in the model: {classes}", ())
    if any(map(rule.is_about, known)):
        return Unmatched(i, f"{reason}: what has such a name multiplies nothing in the compiled graphs", ())
    return Unmatched(i, reason, nearest_names(rule.fqn, (*(fqn for _, fqn, *_ in sites), *known)))


def nearest_names(glob: str, names: Iterable[str | None]) -> tuple[str, ...]:
    """Up to three module names, nearest first, one for all layers that differ in numbers only."""
    score: dict[str, tuple[float, str]] = {}
    for fqn in filter(None, names):
        tail = ".".join(fqn.split(".")[-len(glob.strip("*.").split(".")):])
        ratio = max(SequenceMatcher(None, glob.strip("*.").lower(), name.lower()).ratio() for name in (fqn, tail))
        score.setdefault(re.sub(r"\d+", "#", fqn), (ratio, fqn))
    near = sorted((entry for entry in score.values() if entry[0] >= 0.5), key=lambda entry: -entry[0])
    return tuple(fqn for _, fqn in near[:3])
