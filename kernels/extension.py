"""What a program adds to the built-in element formats, op classes and kernels, and the key that caches get of it.

The tables themselves are where the built-in ones are; here is what they have in common: which names are refused, what
the functions of an addition are made of, and that the additions have changed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

_added: dict[tuple[str, str], tuple[str, tuple[str | None, ...]]] = {}  # (kind, name) → facts, sources of functions
_changes = 0


class ExtensionError(ValueError):
    """An addition that cannot be: the message names what is wrong and the remedy."""


def check_name(kind: str, name: object, taken: Iterable[str]) -> None:
    """Refuse a name that is malformed or taken. Raises ExtensionError."""
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ExtensionError(f"the name of {kind} {name!r} is not possible: use lower-case letters, digits and '_', a "
                             "letter first")
    if (kind, name) in _added:
        raise ExtensionError(f"{kind} {name!r} is registered already; take another name, or remove it first with "
                             f"quartet.extend.unregister_{kind.replace(' ', '_')}({name!r})")
    if name in taken:
        raise ExtensionError(f"{kind} {name!r} is built in; give yours another name, for example 'my_{name}'")


def add(kind: str, name: str, facts: Any, *functions: Callable[..., Any] | None) -> None:
    """Note an addition. ``facts``: whatever else shapes a graph or its numbers, with a ``repr`` that says it all."""
    global _changes
    _added[kind, name] = repr(facts), tuple(source_of(f) for f in functions if f is not None)
    _changes += 1


def remove(kind: str, name: str) -> None:
    """Forget an addition. Raises ExtensionError where there is none of that name."""
    global _changes
    if (kind, name) not in _added:
        there = [repr(n) for k, n in _added if k == kind]
        raise ExtensionError(f"no {kind} {name!r} is registered; registered: {', '.join(there) or 'none'}")
    del _added[kind, name]
    _changes += 1


def changes() -> int:
    """How often something was added or removed: a key for what a process keeps."""
    return _changes


def digest() -> str | None:
    """Key for what is kept on disk: changes with any addition, its facts and the file of each of its functions.

    None, which keeps graphs out of the caches, where the source of a function does not say what it does.
    """
    if any(source is None for _, sources in _added.values() for source in sources):
        return None
    return hashlib.sha256(repr(sorted(_added.items())).encode()).hexdigest()


def source_of(function: Callable[..., Any]) -> str | None:
    """Name, line and hash of the file of a function; None of what has no file, or holds values beside its code."""
    code = getattr(function, "__code__", None)
    held = [getattr(function, name, None) for name in ("__closure__", "__defaults__", "__kwdefaults__", "__self__")]
    path = Path(code.co_filename) if code is not None else None
    if code is None or path is None or any(held) or not path.is_file():
        return None
    return f"{code.co_qualname}:{code.co_firstlineno} {hashlib.sha256(path.read_bytes()).hexdigest()}"
