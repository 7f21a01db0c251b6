"""Compile ``quartet_cpu.cpp`` once a machine and keep the object in a private cache folder.

An object's name is the sha256 of everything that decides its content (source, flags, compiler version,
processor), and the digest of the object itself lies beside it: a truncated or altered file is built again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shlex
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SOURCE = Path(__file__).with_name("quartet_cpu.cpp")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi", "-shared", "-fPIC")
_REMEDY = ("install g++ 9 or newer with OpenMP (Debian: apt-get install g++), or point CXX at one; "
           "without it the slower reference kernels are used")


class BuildError(RuntimeError):
    """The CPU kernels could not be compiled or cached; the message says why and what to do."""


def library() -> Path:
    """Path of the compiled kernels, built if need be.

    ``$CXX`` (default ``g++``) is the compiler, ``$QUARTET_CACHE_DIR`` (default ``$XDG_CACHE_HOME/quartet``
    or ``~/.cache/quartet``) the folder. Concurrent processes build once.

    Raises:
        BuildError: no compiler, a failed compilation, or a cache folder that others could write to.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    folder = cache_dir()
    name = f"quartet_cpu-{_key(compiler)}"
    target, digest = folder / f"{name}.so", folder / f"{name}.sha256"
    if not _intact(target, digest):
        with _lock(folder / f"{name}.lock"):
            if not _intact(target, digest):
                _compile(compiler, target, digest)
    return target


def cache_dir() -> Path:
    """The cache folder, created with mode 0700 if missing. Raises BuildError unless it is private to this user."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quartet"
    folder = Path(os.environ.get("QUARTET_CACHE_DIR") or default)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise BuildError(f"cannot create the kernel cache folder {folder}: {error.strerror or error}; "
                         "set QUARTET_CACHE_DIR to a folder you own") from error
    if status.st_uid != os.getuid():
        raise BuildError(f"kernel cache folder {folder} belongs to user {status.st_uid}, not to you ({os.getuid()}); "
                         "set QUARTET_CACHE_DIR to a folder you own")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BuildError(f"kernel cache folder {folder} has mode {stat.S_IMODE(status.st_mode):04o}: others could "
                         f"replace the code that runs from it; run `chmod 700 {folder}`")
    return folder


def _key(compiler: list[str]) -> str:
    version = _run([*compiler, "--version"])
    parts = (SOURCE.read_bytes(), " ".join(FLAGS).encode(), " ".join(compiler).encode(), version.encode(),
             _processor().encode())
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:32]


def _processor() -> str:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    wanted = ("vendor_id", "cpu family", "model", "stepping", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(line for line in lines if line.split(":")[0].strip() in wanted)


def _intact(target: Path, digest: Path) -> bool:
    try:
        return hashlib.sha256(target.read_bytes()).hexdigest() == digest.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return False


def _compile(compiler: list[str], target: Path, digest: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="build-", dir=target.parent) as scratch:
        built, note = Path(scratch) / target.name, Path(scratch) / digest.name
        _run([*compiler, *FLAGS, str(SOURCE), "-o", str(built)])
        note.write_text(hashlib.sha256(built.read_bytes()).hexdigest() + "\n")
        os.replace(built, target)
        os.replace(note, digest)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"cannot run the C++ compiler `{command[0]}`: {error}; {_REMEDY}") from error
    if done.returncode != 0:
        tail = "\n".join(done.stderr.strip().splitlines()[-20:])
        raise BuildError(f"`{shlex.join(command)}` failed with status {done.returncode}; {_REMEDY}\n{tail}")
    return done.stdout


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
