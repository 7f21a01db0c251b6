"""A private folder of compiled kernels: each object is built once, checked whenever it is used, and rebuilt if damaged.

An object's name ends in a hash of everything that decides its content. Beside ``NAME.so`` lie ``NAME.sha256``, the
digest of the object, and ``NAME.json``, what its build noted down; ``NAME.lock`` is held while it is built, in a folder
``build-NAME.…``. What else is in the folder is another's: what is listed and removed goes by its full name.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from quartet.kernels.files import expanded, foreign_link, trusted

Notes = Mapping[str, Any]
VARIABLE = "QUARTET_CACHE_DIR"
RELOCATE = f"set {VARIABLE} to an empty folder of yours that is not mounted noexec, where they are built anew"
_STEM = r"((?:quartet_\w+|optimizer|cutlass_tuned)-[0-9a-f]{32})"
_FILE = re.compile(_STEM + r"\.(?:so|sha256|json|lock)")
_SCRATCH = re.compile(r"build-" + _STEM + r"\.\w+")
_REMEDIES = (  # of what a system or a compiler says
    (("No space left", "quota exceeded"), "make room on that disk, or set {} to a folder on another one"),
    (("Read-only file system", "Permission denied", "not permitted"), "set {} to a folder that you can write to"),
    (("No usable temporary directory",), "set TMPDIR to a folder that you can write to"),
    (("out of memory", "memory exhausted", "Cannot allocate memory", "Killed"),
     "it takes more memory than is free: try again when there is more"),
)


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


def cache_dir(create: bool = True) -> Path:
    """The cache folder: ``$QUARTET_CACHE_DIR``, by default ``$XDG_CACHE_HOME/quartet`` or ``~/.cache/quartet``.

    Args:
        create: make it, with mode 0700, if it is missing.
    Raises:
        BuildError: it is not private to this user, no variable names a folder and this user has no home, or one names
            that of a user who is none.
    """
    named, above = os.environ.get(VARIABLE), os.environ.get("XDG_CACHE_HOME")
    try:
        folder = expanded(named) if named else (expanded(above) if above else Path.home() / ".cache") / "quartet"
    except FileNotFoundError as error:
        raise BuildError(f"environment variable {VARIABLE if named else 'XDG_CACHE_HOME'}, for the kernel cache: "
                         f"{error.strerror}") from error
    except RuntimeError as error:
        raise BuildError(f"user {os.getuid()} has no home folder for the kernel cache: set {VARIABLE} to a folder you "
                         "own") from error
    return private_folder(folder, create=create)


def private_folder(folder: Path, what: str = "kernel cache folder", variable: str = VARIABLE,
                   create: bool = True) -> Path:
    """``folder``, created if missing and ``create``. Raises BuildError unless this user owns it and nobody else but
    root can write to it, or put another in its place.

    ``what`` it is and the environment ``variable`` that puts it elsewhere are for the message.
    """
    elsewhere = f"set {variable} to a folder you own"
    try:
        link = foreign_link(folder)
        if link is not None:
            raise BuildError(f"the {what} {folder} is behind the link {link} of user {link.lstat().st_uid}, who could "
                             f"lead it elsewhere; {elsewhere}, by a path without that link")
        if create:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
        elif not folder.exists():
            return folder
        status, parent = folder.stat(), folder.resolve().parent
        above = parent.stat()
    except OSError as error:
        raise BuildError(f"cannot create the {what} {folder}: {error.strerror or error}; "
                         f"{remedy_of(str(error), elsewhere, variable)}") from error
    if not stat.S_ISDIR(status.st_mode):
        raise BuildError(f"the {what} {folder} is no folder; {elsewhere}")
    if status.st_uid != os.getuid():
        raise BuildError(f"{what} {folder} belongs to user {status.st_uid}, not to you ({os.getuid()}); {elsewhere}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BuildError(f"{what} {folder} has mode {stat.S_IMODE(status.st_mode):04o}: others could "
                         f"replace the code that runs from it; set {variable} to one of your own, or, if nobody else "
                         f"uses it, run `chmod 700 {folder}`")
    if above.st_uid not in trusted():
        raise BuildError(f"the {what} {folder} lies in {parent} of user {above.st_uid}, who could put another in its "
                         f"place; {elsewhere} in one that is yours")
    others = stat.S_IWOTH | (0 if above.st_gid == os.getgid() else stat.S_IWGRP)  # a umask of 002 means one's own group
    if above.st_mode & others and not above.st_mode & stat.S_ISVTX:
        raise BuildError(f"the {what} {folder} lies in {parent}, of mode {stat.S_IMODE(above.st_mode):04o}: others "
                         f"could put another folder in its place; run `chmod go-w {parent}`, or set {variable} to a "
                         "folder in one that only you can write to")
    return folder


def remedy_of(said: str, otherwise: str, variable: str = VARIABLE) -> str:
    """What to do about words of the system or of a compiler; ``otherwise`` where they are of no known kind.

    ``variable`` of the environment puts elsewhere what could not be written.
    """
    return next((remedy.format(variable) for words, remedy in _REMEDIES if any(word in said for word in words)),
                otherwise)


def fingerprint(*parts: bytes) -> str:
    """32 hexadecimal digits that change with every part and with where one part ends and the next begins."""
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:32]


def target_of(name: str) -> Path:
    """Where the object of that name lies, built or not."""
    return cache_dir() / f"{name}.so"


def write_json(target: Path, content: Mapping[str, Any]) -> None:
    """Replace a file of the cache by ``content``: whoever reads it finds the old or the new one, whole. Raises
    BuildError."""
    with _writing(target), tempfile.TemporaryDirectory(prefix=f"build-{target.stem}.", dir=target.parent) as scratch:
        path = Path(scratch) / target.name
        path.write_text(json.dumps(dict(content), indent=1) + "\n")
        os.replace(path, target)


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
    and what stands at ``target`` is whole at every moment. Raises BuildError: of ``build``, or nothing can be written.
    """
    if intact(target):
        return False
    with _writing(target), locked(target):
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
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def entries() -> list[Entry]:
    """Every object in the cache folder, by name; nothing is created."""
    found = []
    for path in files("*", "so"):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        found.append(Entry(path, status.st_size, status.st_mtime, intact(path), notes_of(path)))
    return found


def files(names: str, suffix: str) -> list[Path]:
    """The files of this package in the cache folder whose stems match ``names`` (with ``*`` and ``?``), in order;
    nothing is created."""
    found = cache_dir(create=False).glob(f"{names}.{suffix}")
    return sorted(path for path in found if _FILE.fullmatch(path.name) and path.is_file())


def latest(names: str, source: str) -> Path | None:
    """The intact object that was built last of those whose stems match ``names`` and whose notes have this ``source``;
    None without one. Raises BuildError where the cache folder cannot be used."""
    found = [path for path in files(names, "so") if notes_of(path).get("source") == source and intact(path)]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def clear(spared: str | None = None) -> tuple[int, int]:
    """Remove from the cache folder what this package made and does not build just now; (objects, bytes) removed.

    Stems that begin with ``spared`` stay. Links are removed themselves, not what they lead to. Raises BuildError where
    nothing can be removed.
    """
    folder = cache_dir(create=False)
    ours: defaultdict[str, list[Path]] = defaultdict(list)
    for path in folder.iterdir() if folder.is_dir() else ():
        match = (_SCRATCH if _is_folder(path) else _FILE).fullmatch(path.name)
        if match is not None and (spared is None or not match[1].startswith(spared)):
            ours[match[1]].append(path)
    count = size = 0
    for stem, paths in sorted(ours.items()):
        target, lock = folder / f"{stem}.so", folder / f"{stem}.lock"
        if lock.is_symlink():
            _remove(lock)
        try:
            with _writing(target), locked(target, wait=False):
                for path in (*(path for path in paths if path != lock), lock):
                    if path == target:
                        count, size = count + 1, size + path.lstat().st_size
                    _remove(path)
        except BlockingIOError:
            continue
    return count, size


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _remove(path: Path) -> None:
    if _is_folder(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def run_compiler(command: list[str], what: str, remedy: str, timeout: float = 300) -> tuple[str, str]:
    """Standard output and error of a compiler; BuildError with the end of what it said if it fails, and with ``remedy``
    unless that names another cause, such as a full disk."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout,
                              env=os.environ | {"LC_ALL": "C"})
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"the {what} `{command[0]}` did not end in {timeout:.0f} s; try again when the machine has "
                         "less to do") from error
    except OSError as error:
        raise BuildError(f"cannot run the {what} `{command[0]}`: {error}; {remedy}") from error
    if done.returncode != 0:
        said = done.stderr.strip() or done.stdout.strip()
        tail = "\n".join(said.splitlines()[-20:])
        raise BuildError(f"`{shlex.join(command)}` failed with status {done.returncode}; "
                         f"{remedy_of(said, remedy, f'{VARIABLE} and TMPDIR')}\n{tail}")
    return done.stdout, done.stderr


def _remove_abandoned(target: Path) -> None:
    """Remove the scratch folders of builds that were killed; the caller holds the lock, so nobody works in them."""
    for scratch in target.parent.glob(f"build-{target.stem}.*"):
        _remove(scratch)


@contextmanager
def locked(target: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock of an object or another file of the cache. Raises BlockingIOError where it is taken and ``wait`` is
    False, BuildError where it cannot be made."""
    path = target.with_suffix(".lock")
    while True:
        with open_lock(path) as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if _is_at(path, os.fstat(handle.fileno())):
                try:
                    yield
                finally:
                    fcntl.flock(handle, fcntl.LOCK_UN)  # a process forked meanwhile has the handle open too
                return


def open_lock(path: Path, variable: str = VARIABLE) -> IO[bytes]:
    """A file to lock, made if it is missing and never changed. Raises BuildError, also where it is a link; ``variable``
    of the environment puts its folder elsewhere."""
    with _writing(path, variable):
        return open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "rb+")


@contextmanager
def _writing(path: Path, variable: str = VARIABLE) -> Iterator[None]:
    """An error of the system becomes a BuildError about the folder of ``path``; a taken lock stays what it is."""
    try:
        yield
    except BlockingIOError:
        raise
    except OSError as error:
        raise BuildError(f"cannot write to the folder {path.parent}: {error.strerror or error}; "
                         f"{remedy_of(str(error), f'set {variable} to another folder of yours', variable)}") from error


def _is_at(path: Path, status: os.stat_result) -> bool:
    """Whether the file is there still: ``clear`` removes locks, and who waited for one then holds what nobody sees."""
    try:
        return os.path.samestat(path.lstat(), status)
    except FileNotFoundError:
        return False
