"""Paths that users give, and what is written there: nobody else's link leads it to another place."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

ROOT = 0


def trusted(proc: Path = Path("/proc")) -> set[int]:
    """The users whose folders and links are trusted: this one, and root, who can do anything anyway.

    In a user namespace without root (apptainer, rootless containers) what is root's bears the kernel's overflow number.
    """
    users = {os.getuid(), ROOT}
    try:
        ranges = [tuple(map(int, line.split())) for line in (proc / "self/uid_map").read_text().splitlines()]
        if not any(outside <= ROOT < outside + count for _, outside, count in ranges):
            users.add(int((proc / "sys/kernel/overflowuid").read_text()))
    except (OSError, ValueError):
        pass
    return users


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path as a user wrote it, with the home folder for a ``~`` or ``~user`` at its beginning.

    Raises FileNotFoundError, whose ``strerror`` says what to write instead, where there is no such home.
    """
    text = os.fspath(path)
    found = Path(text)
    if not text.startswith("~"):
        return found.absolute() if str(found).startswith("~") else found  # ./~x is a folder of that name
    try:
        return found.expanduser()
    except RuntimeError:
        raise FileNotFoundError(errno.ENOENT, f"{found.parts[0]} is nobody's home folder here; write the path from / "
                                              f"on, or ./{text} for what is named so", text) from None


def foreign_link(path: Path) -> Path | None:
    """The first link on the way to ``path``, itself included, that belongs to another user."""
    return next((link for link in _links(path.absolute(), set()) if link.lstat().st_uid not in trusted()), None)


def check(path: Path) -> None:
    """PermissionError where another user's link leads to ``path``, and so would lead what is written there."""
    link = foreign_link(path)
    if link is not None:
        raise PermissionError(errno.EPERM, f"the link {link} belongs to user {link.lstat().st_uid}; remove it, or "
                                           "write to another folder", str(path))


def opener(name: str, flags: int) -> int:
    """For ``open(path, "w", opener=opener)``, which then raises what :func:`check` does."""
    path = Path(name)
    check(path)
    return os.open(path, flags if path.is_symlink() else flags | os.O_NOFOLLOW, 0o666)


def write_text(path: Path, text: str) -> None:
    """``path`` with this text in UTF-8 and nothing else. Raises OSError, also as :func:`check` does."""
    with open(path, "w", encoding="utf-8", opener=opener) as file:
        file.write(text)


def _links(path: Path, seen: set[Path]) -> Iterator[Path]:
    for part in (*reversed(path.parents), path):
        if part not in seen and part.is_symlink():
            seen.add(part)
            yield part
            yield from _links(part.parent / part.readlink(), seen)
