"""Compile a C++ file once a machine and keep the object in the private cache folder.

The object's name holds a hash of everything that decides its content: source, flags, compiler version, processor.
"""

from __future__ import annotations

import os
import platform
import shlex
from pathlib import Path

from quartet.kernels.build_cache import BuildError, build_once, cache_dir, fingerprint, run_compiler, target_of

__all__ = ["BuildError", "cache_dir", "library"]

SOURCE = Path(__file__).with_name("quartet_cpu.cpp")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi", "-shared", "-fPIC")
_REMEDY = ("install g++ 9 or newer with OpenMP (Debian: apt-get install g++), or point CXX at one; "
           "without it the slower reference kernels are used")


def library(source: Path | None = None) -> Path:
    """Path of the compiled kernels of ``source`` (default ``quartet_cpu.cpp``), built if need be.

    ``$CXX`` (default ``g++``) is the compiler, ``quartet.kernels.build_cache.cache_dir()`` the folder. Concurrent
    processes build once.

    Raises:
        BuildError: no compiler, a failed compilation, or a cache folder that others could write to.
    """
    source = source or SOURCE
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    target = target_of(f"{source.stem}-{_key(compiler, source)}")
    build_once(target, lambda path: _compile(compiler, source, path))
    return target


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
    _run([*compiler, *FLAGS, str(source), "-o", str(path)])


def _run(command: list[str]) -> str:
    return run_compiler(command, "C++ compiler", _REMEDY)[0]
