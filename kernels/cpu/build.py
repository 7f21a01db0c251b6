"""Compile a C++ file once a machine and keep the object in the private cache folder.

The object's name holds a hash of everything that decides its content: source, flags, compiler version, processor.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quartet.kernels.build_cache import (
    RELOCATE,
    BuildError,
    build_once,
    cache_dir,
    fingerprint,
    run_compiler,
    target_of,
)

__all__ = ["BuildError", "cache_dir", "functions", "library"]

log = logging.getLogger(__name__)
SOURCE = Path(__file__).with_name("quartet_cpu.cpp")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi", "-shared", "-fPIC")
_REMEDY = "install g++ 9 or newer with OpenMP (Debian: apt-get install g++), or point CXX at one"


def functions(signatures: Mapping[str, tuple[Any, ...]], source: Path | None = None) -> dict[str, Callable[..., None]]:
    """The C functions ``quartet_NAME`` of :func:`library` by NAME, which take what ``signatures`` says and return
    nothing. Raises BuildError, also where the object cannot be used."""
    path = library(source)
    found: dict[str, Callable[..., None]] = {}
    try:
        shared = ctypes.CDLL(str(path))
        for name, signature in signatures.items():
            function = found[name] = getattr(shared, f"quartet_{name}")
            function.argtypes, function.restype = signature, None
    except (OSError, AttributeError) as error:
        raise BuildError(f"cannot use the compiled kernels: {error}; {RELOCATE}") from error
    return found


def library(source: Path | None = None) -> Path:
    """Path of the compiled kernels of ``source`` (default ``quartet_cpu.cpp``), built if need be.

    ``$CXX`` (default ``g++``) is the compiler, ``quartet.kernels.build_cache.cache_dir()`` the folder. Concurrent
    processes build once.

    Raises:
        BuildError: no compiler, a failed compilation, or a cache folder that others could write to, or this user
            cannot.
    """
    source = source or SOURCE
    command = compiler()
    target = target_of(f"{source.stem}-{_key(command, source)}")
    build_once(target, lambda path: _compile(command, source, path))
    return target


def compiler() -> list[str]:
    """``$CXX``, by default ``g++``, as a command. Raises BuildError: it is none."""
    named = os.environ.get("CXX", "")
    try:
        return shlex.split(named) or ["g++"]
    except ValueError as error:
        raise BuildError(f"CXX={named!r} is no command: {error}; point CXX at g++ 9 or newer") from error


def _key(compiler: list[str], source: Path) -> str:
    version = _run([*compiler, "--version"])
    return fingerprint(source.read_bytes(), " ".join(FLAGS).encode(), " ".join(compiler).encode(), version.encode(),
                       _processor().encode())


def _processor() -> str:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    wanted = ("vendor_id", "cpu family", "model", "stepping", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(line for line in lines if line.split(":")[0].strip() in wanted)


def _compile(compiler: list[str], source: Path, path: Path) -> None:
    log.warning("compiling %s with %s: up to a minute, this once", source.name, shlex.join(compiler))
    _run([*compiler, *FLAGS, str(source), "-o", str(path)])


def _run(command: list[str]) -> str:
    return run_compiler(command, "C++ compiler", _REMEDY)[0]
