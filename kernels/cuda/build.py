"""Compile the CUDA quantisers once a machine and keep the object, a cubin, in the private cache folder."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

from quartet.kernels.build_cache import (
    BuildError,
    build_once,
    fingerprint,
    intact,
    latest,
    run_compiler,
    target_of,
)
from quartet.kernels.cutlass.build import resources
from quartet.kernels.cutlass.toolchain import code_for, find_nvcc, nvcc_version

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
SOURCE = FOLDER / "quantizers.cu"
ARCHITECTURE = "sm_90a"  # wgmma
NAME = f"quartet_cuda_{ARCHITECTURE}"
FLAGS = ("-std=c++17", "-O3", "-cubin", "-Xptxas=-v", *code_for(ARCHITECTURE))
TIMEOUT_SECONDS = 600.0
REMEDY = "install a CUDA toolkit of 12.0 or newer and put its bin folder on PATH, or set CUDA_HOME"
OLDEST_NVCC = (12, 0)


_failures: dict[Path, str] = {}  # of this process: what does not compile is not tried again
_compiling = threading.Lock()


def unavailable() -> str | None:
    """None where the object is there, or is now that it has been compiled, else why not."""
    try:
        library()
    except BuildError as error:
        return _not_built(str(error))
    return None


def foreseen() -> str | None:
    """:func:`unavailable` as far as it is told without compiling: None where a compiler is there and has not failed."""
    try:
        _, version = _nvcc()
        failed = _failures.get(_target(version))
    except BuildError as error:
        failed = None if built_ahead() is not None else str(error)
    return None if failed is None else _not_built(failed)


def begin() -> None:
    """Begin to compile what is not there, on a thread of its own, for which :func:`library` waits."""
    threading.Thread(target=unavailable, name="quartet-nvcc", daemon=True).start()


def library() -> Path:
    """Path of the compiled kernels, built if need be: once, however many threads and processes ask.

    Without a compiler, an object that another machine built from the same source with the same flags.

    Raises:
        BuildError: no compiler and no such object, a failed compilation, or a cache folder that cannot be used.
    """
    try:
        nvcc, version = _nvcc()
    except BuildError:
        found = built_ahead()
        if found is None:
            raise
        return found
    target = _target(version)
    with _compiling:
        if target in _failures:
            raise BuildError(_failures[target])
        if not intact(target):
            log.warning("compiling the CUDA quantisers with nvcc: half a minute, this once")
        try:
            build_once(target, lambda path: _compile(nvcc, version, path))
        except BuildError as error:
            _failures[target] = str(error)
            raise
    return target


def built_ahead() -> Path | None:
    """An intact object of the kernels in the cache, of any nvcc, the latest of several; None without one."""
    try:
        return latest(f"{NAME}-*", _source())
    except BuildError:
        return None


def _source() -> str:
    """A hash of sources and flags: what the kernels are, whichever compiler made them."""
    sources = (SOURCE, *sorted(FOLDER.glob("*.cuh")))
    return fingerprint(*(path.read_bytes() for path in sources), " ".join(FLAGS).encode())


def _nvcc() -> tuple[Path, str]:
    """The compiler and its version. Raises BuildError where there is none or it is too old."""
    nvcc = find_nvcc()
    version = nvcc_version(nvcc)
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_NVCC:
        raise BuildError(f"{nvcc} is version {version}; {REMEDY}")
    return nvcc, version


def _target(version: str) -> Path:
    """Where the object lies that this version makes. Raises BuildError: the cache folder cannot be used."""
    return target_of(f"{NAME}-{fingerprint(_source().encode(), version.encode())}")


def _not_built(said: str) -> str:
    return f"the CUDA quantisers are not built: {said.splitlines()[0]}"


def _compile(nvcc: Path, version: str, path: Path) -> dict[str, Any]:
    start = time.monotonic()
    said = "".join(run_compiler([str(nvcc), *FLAGS, str(SOURCE), "-o", str(path)], "CUDA compiler",
                                f"the CUDA quantisers were not built; {REMEDY}", TIMEOUT_SECONDS))
    return {"configuration": NAME, "source": _source(), "seconds": round(time.monotonic() - start, 1),
            **resources(said), "nvcc": version}
