"""Compile configurations with nvcc, each once a machine, and keep the objects in the private cache folder."""

from __future__ import annotations

import logging
import re
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quartet.kernels.build_cache import BuildError, build_once, fingerprint, intact, notes_of, run_compiler, target_of
from quartet.kernels.cutlass.configuration import Configuration
from quartet.kernels.cutlass.memory import compile_slot
from quartet.kernels.cutlass.template import render
from quartet.kernels.cutlass.toolchain import FALLBACK, Toolchain, toolchain

log = logging.getLogger(__name__)

FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-shared", "-cudart=static",
         "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v")
TIMEOUT_SECONDS = 1800.0


@dataclass(frozen=True)
class Build:
    """A compiled kernel and what its compilation said; zeros and empty strings where its notes were lost.

    Attributes:
        path: the shared object. fresh: whether this call compiled it.
        seconds: time of the compilation. registers: a thread. spills: bytes stored and loaded, stack included.
        nvcc, cutlass: versions that made it.
    """

    configuration: Configuration
    path: Path
    fresh: bool
    seconds: float = 0.0
    registers: int = 0
    spills: int = 0
    nvcc: str = ""
    cutlass: str = ""


Report = Callable[[Configuration, "Build | BuildError | None"], None]


def flags(arch: str) -> tuple[str, ...]:
    """Arguments of nvcc for an architecture, without those that name files. Exactly one code is generated."""
    return (*FLAGS, "-gencode", f"arch=compute_{arch.removeprefix('sm_')},code={arch}")


def target(configuration: Configuration, tools: Toolchain) -> Path:
    """Where the object lies, built or not: its name has a hash of source, flags, nvcc's and the headers' versions."""
    key = fingerprint(render(configuration).encode(), " ".join(flags(configuration.arch)).encode(),
                      tools.nvcc_version.encode(), tools.cutlass_version.encode())
    return target_of(f"{configuration.name}-{key}")


def is_built(configuration: Configuration) -> bool:
    """Whether :func:`build` would find the object in the cache, intact. Raises BuildError without a toolchain."""
    return intact(target(configuration, toolchain()))


def build(configuration: Configuration) -> Build:
    """The kernel's object, compiled if need be: once, however many processes ask, and only when memory has room.

    Raises:
        BuildError: nvcc or the headers are missing or too old, the compilation fails, or others can write to the cache.
    """
    tools = toolchain()
    tools.check(configuration.arch)
    path = target(configuration, tools)
    fresh = build_once(path, lambda built: _compile(configuration, tools, built))
    notes = notes_of(path)
    known = {name: notes[name] for name in ("seconds", "registers", "spills", "nvcc", "cutlass") if name in notes}
    return Build(configuration, path, fresh, **known)


def build_all(configurations: Iterable[Configuration], jobs: int, report: Report = lambda configuration, outcome: None,
              ) -> list[Build | BuildError]:
    """Build many, at most ``jobs`` at once and never more than memory has room for; one failure stops no other.

    Args:
        report: called with a configuration and None when its turn comes, then with its build or its error; from the
            threads that build, one call at a time for a configuration.
    Returns:
        What became of each, in the order given.
    """

    def one(configuration: Configuration) -> Build | BuildError:
        report(configuration, None)
        outcome: Build | BuildError
        try:
            outcome = build(configuration)
        except BuildError as error:
            outcome = error
        report(configuration, outcome)
        return outcome

    with ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
        futures = [pool.submit(one, configuration) for configuration in configurations]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _compile(configuration: Configuration, tools: Toolchain, path: Path) -> dict[str, Any]:
    with compile_slot(), tempfile.TemporaryDirectory(prefix="source-", dir=path.parent) as folder:
        source = Path(folder) / f"{configuration.name}.cu"
        source.write_text(render(configuration), encoding="utf-8")
        command = [str(tools.nvcc), *flags(configuration.arch), f"-I{tools.include}", str(source), "-o", str(path)]
        start = time.monotonic()
        said = "".join(run_compiler(command, "CUDA compiler", f"{configuration.name} was not built; {FALLBACK}",
                                    TIMEOUT_SECONDS))
        seconds = time.monotonic() - start
    notes: dict[str, Any] = {"configuration": configuration.name, "seconds": round(seconds, 1), **resources(said),
                             "nvcc": tools.nvcc_version, "cutlass": tools.cutlass_version}
    log.info("%s: built in %.0f s, %d registers, %d bytes spilled", configuration.name, seconds, notes["registers"],
             notes["spills"])
    return notes


def resources(said: str) -> dict[str, int]:
    """``registers`` a thread and ``spills`` in bytes (stack, stores and loads), the most of any kernel, of ptxas -v."""
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", said)]
    spills = [sum(map(int, sizes)) for sizes in re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)]
    return {"registers": max(registers, default=0), "spills": max(spills, default=0)}
