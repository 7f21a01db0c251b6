"""The nearest of several names to one that does not exist."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: object, legal: Iterable[str]) -> str:
    """``"did you mean 'x'? "`` for the nearest of ``legal``, or the empty string when nothing is near."""
    by_lower = {option.lower(): option for option in legal}
    near = get_close_matches(str(name).lower(), by_lower, n=1)
    return f"did you mean {by_lower[near[0]]!r}? " if near else ""
