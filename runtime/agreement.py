"""That the ranks of a job have the same kernels, asked when the first graph of a policy is compiled.

A rank without a compiler takes another kernel, and may round to other numbers. Ranks that share a layer have to compute
what they replicate alike, so each waits for the answers of the others, up to a limit: where one has other kernels,
could not tell, or does not come, all of them end with an error that says which. They compile the same graphs at the
same time, which data-parallel ranks and stages of a pipeline need not. Those wait for nobody: whoever finds other
answers than its own says so in a warning, since averaged gradients keep weights equal whatever computed them.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

from quartet.runtime import compat
from quartet.runtime.streams import rank

LIMIT = timedelta(minutes=5)
FAILED = "failed: "
_asked: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()  # store → questions; a new group has a new store


class RanksDiffer(RuntimeError):
    """Ranks that have to compute the same numbers would not."""


def same_kernels(question: str, answer: Callable[[], str], together: Sequence[int] | None = None) -> str:
    """``answer()``, once it is known to be that of the other ranks.

    Args:
        question: what all ranks ask alike. answer: what this rank's kernels say.
        together: the ranks that share layers with this one; None for no such ranks.
    Raises:
        RanksDiffer: on each rank of ``together``, if one answers otherwise, fails or takes longer than ``LIMIT``.
    """
    store = compat.default_store()
    if store is None or question in _asked.setdefault(store, set()):
        return answer()
    _asked[store].add(question)
    prefix = f"quartet/{hashlib.sha256(question.encode()).hexdigest()}"
    try:
        own = answer()
    except Exception as error:
        store.set(f"{prefix}/{rank()}", f"{FAILED}{type(error).__name__}: {error}")
        raise
    store.set(f"{prefix}/{rank()}", own)
    if together is not None:
        _meet(store, prefix, own, together)
    else:
        _look(store, prefix, own)
    return own


def _meet(store: Any, prefix: str, own: str, together: Sequence[int]) -> None:
    for other in together:
        try:
            store.wait([f"{prefix}/{other}"], LIMIT)
        except Exception as error:  # of whichever kind the store is
            raise RanksDiffer(f"rank {other} shares layers with rank {rank()} and has compiled nothing within "
                              f"{LIMIT}: {error}") from None
        theirs = store.get(f"{prefix}/{other}").decode()
        if theirs.startswith(FAILED):
            raise RanksDiffer(f"rank {other} cannot compile: {theirs.removeprefix(FAILED)}")
        if theirs != own:
            raise RanksDiffer(f"{_difference(other, own, theirs)}. They share layers, whose numbers have to be equal: "
                              "give all ranks the same compilers and caches (`quartet doctor` shows them)")


def _look(store: Any, prefix: str, own: str) -> None:
    first = f"{prefix}/first"
    mark = f"{rank()} {own}"
    found = store.compare_set(first, "", mark).decode()
    other, _, theirs = found.partition(" ")
    if found != mark and theirs != own:
        warnings.warn(f"{_difference(int(other), own, theirs)}: they may round otherwise (`quartet doctor` shows what "
                      "a rank has)", stacklevel=2)


def _difference(other: int, own: str, theirs: str) -> str:
    """Where two answers part, with what stands around it."""
    at = next((i for i, (a, b) in enumerate(zip(own, theirs, strict=False)) if a != b), min(len(own), len(theirs)))
    start = max(0, at - 40)
    return (f"rank {rank()} and rank {other} have other kernels: …{own[start:at + 80]!r}… here and "
            f"…{theirs[start:at + 80]!r}… there")
