"""A private folder of compiled kernels: each object is built once, checked whenever it is used, and rebuilt if damaged.

An object's name ends in a hash of everything that decides its content. Beside ``NAME.so`` lie ``NAME.sha256``, the
digest of the object, and ``NAME.json``, what its build noted down; ``NAME.lock`` is held while it is built.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Notes = Mapping[str, Any]


class BuildError(RuntimeError):
    """Kernels could not be compiled or cached; the message says why and what to do."""


@dataclass(frozen=True)
class Entry:
    """One object of the cache.

    Attributes:
        path: the object. size: its bytes. built: seconds since 1970.
        intact: whether it is what its build left. notes: what its build noted down; empty if nothing.
    """

    path: Path
    size: int
    built: float
    intact: bool
    notes: Notes


def cache_dir() -> Path:
    """The cache folder: ``$QUARTET_CACHE_DIR``, by default ``$XDG_CACHE_HOME/quartet`` or ``~/.cache/quartet``.

    Created with mode 0700 if missing. Raises BuildError unless it is private to this user.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quartet"
    return private_folder(Path(os.environ.get("QUARTET_CACHE_DIR") or default))


def private_folder(folder: Path, what: str = "kernel cache folder", variable: str = "QUARTET_CACHE_DIR") -> Path:
    """``folder``, created if missing. Raises BuildError unless this user owns it and nobody else can write to it, or
    put another in its place.

    ``what`` it is and the environment ``variable`` that puts it elsewhere are for the message.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        status, parent = folder.stat(), folder.resolve().parent
        above = parent.stat()
    except OSError as error:
        raise BuildError(f"cannot create the {what} {folder}: {error.strerror or error}; "
                         f"set {variable} to a folder you own") from error
    if status.st_uid != os.getuid():
        raise BuildError(f"{what} {folder} belongs to user {status.st_uid}, not to you ({os.getuid()}); "
                         f"set {variable} to a folder you own")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BuildError(f"{what} {folder} has mode {stat.S_IMODE(status.st_mode):04o}: others could "
                         f"replace the code that runs from it; run `chmod 700 {folder}`")
    others = stat.S_IWOTH | (0 if above.st_gid == os.getgid() else stat.S_IWGRP)  # a umask of 002 means one's own group
    if above.st_mode & others and not above.st_mode & stat.S_ISVTX:
        raise BuildError(f"the {what} {folder} lies in {parent}, of mode {stat.S_IMODE(above.st_mode):04o}: others "
                         f"could put another folder in its place; run `chmod go-w {parent}`, or set {variable} to a "
                         "folder in one that only you can write to")
    return folder


def fingerprint(*parts: bytes) -> str:
    """32 hexadecimal digits that change with every part and with where one part ends and the next begins."""
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:32]


def target_of(name: str) -> Path:
    """Where the object of that name lies, built or not."""
    return cache_dir() / f"{name}.so"


def write_json(target: Path, content: Mapping[str, Any]) -> None:
    """Replace a file of the cache by ``content``: whoever reads it finds the old or the new one, whole."""
    with tempfile.NamedTemporaryFile("w", dir=target.parent, prefix=f"{target.stem}.", delete=False) as handle:
        handle.write(json.dumps(dict(content), indent=1) + "\n")
    os.replace(handle.name, target)


def intact(target: Path) -> bool:
    """Whether the object is there and is, bit for bit, what its build left."""
    try:
        digest = target.with_suffix(".sha256").read_text().strip()
        return hashlib.sha256(target.read_bytes()).hexdigest() == digest
    except (OSError, UnicodeDecodeError):
        return False


def build_once(target: Path, build: Callable[[Path], Notes | None]) -> bool:
    """Make ``target`` with ``build(path)`` unless it is there and intact; True if this call built it.

    ``build`` writes the object to the path it is given and returns what to note down. Concurrent processes build once,
    and what stands at ``target`` is whole at every moment.
    """
    if intact(target):
        return False
    with locked(target):
        if intact(target):
            return False
        _remove_abandoned(target)
        with tempfile.TemporaryDirectory(prefix=f"build-{target.stem}.", dir=target.parent) as scratch:
            built = Path(scratch) / target.name
            notes = build(built)
            digest, noted = built.with_suffix(".sha256"), built.with_suffix(".json")
            digest.write_text(hashlib.sha256(built.read_bytes()).hexdigest() + "\n")
            if notes is not None:
                noted.write_text(json.dumps(dict(notes), indent=1) + "\n")
            for path in (built, noted, digest):
                if path.exists():
                    os.replace(path, target.parent / path.name)
    return True


def notes_of(target: Path) -> Notes:
    """What the build of an object noted down, or what :func:`write_json` wrote; empty if nothing readable is there."""
    try:
        found = json.loads(target.with_suffix(".json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def entries() -> list[Entry]:
    """Every object in the cache folder, by name."""
    found = []
    for path in sorted(cache_dir().glob("*.so")):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        found.append(Entry(path, status.st_size, status.st_mtime, intact(path), notes_of(path)))
    return found


def clear() -> tuple[int, int]:
    """Empty the cache of all that is not being built just now; (objects, bytes) removed."""
    folder = cache_dir()
    count = size = 0
    stems = {path.stem for suffix in ("so", "sha256", "json", "lock") for path in folder.glob(f"*.{suffix}")}
    for stem in sorted(stems):
        target = folder / f"{stem}.so"
        try:
            with locked(target, wait=False):
                if target.exists():
                    count, size = count + 1, size + target.stat().st_size
                _remove_abandoned(target)
                for suffix in (".so", ".sha256", ".json", ".lock"):
                    target.with_suffix(suffix).unlink(missing_ok=True)
        except BlockingIOError:
            continue
    return count, size


def run_compiler(command: list[str], what: str, remedy: str, timeout: float = 300) -> tuple[str, str]:
    """Standard output and error of a compiler; BuildError with the end of what it said and ``remedy`` if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"cannot run the {what} `{command[0]}`: {error}; {remedy}") from error
    if done.returncode != 0:
        tail = "\n".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-20:])
        raise BuildError(f"`{shlex.join(command)}` failed with status {done.returncode}; {remedy}\n{tail}")
    return done.stdout, done.stderr


def _remove_abandoned(target: Path) -> None:
    """Remove the scratch folders of builds that were killed; the caller holds the lock, so nobody works in them."""
    for scratch in target.parent.glob(f"build-{target.stem}.*"):
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def locked(target: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock of an object or another file of the cache. Raises BlockingIOError where it is taken and ``wait`` is
    False."""
    path = target.with_suffix(".lock")
    while True:
        with open(path, "w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if _is_at(path, os.fstat(handle.fileno())):
                yield
                return


def _is_at(path: Path, status: os.stat_result) -> bool:
    """Whether the file is there still: ``clear`` removes locks, and who waited for one then holds what nobody sees."""
    try:
        return os.path.samestat(path.stat(), status)
    except FileNotFoundError:
        return False
