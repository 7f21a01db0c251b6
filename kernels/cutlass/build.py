"""Compile configurations with nvcc, each once a machine, and keep the objects in the private cache folder."""

from __future__ import annotations

import logging
import re
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from quartet.kernels.build_cache import (
    BuildError,
    build_once,
    cache_dir,
    fingerprint,
    intact,
    latest,
    notes_of,
    run_compiler,
    target_of,
)
from quartet.kernels.cutlass.configuration import Configuration, table
from quartet.kernels.cutlass.memory import compile_slot
from quartet.kernels.cutlass.template import render
from quartet.kernels.cutlass.toolchain import FALLBACK, Toolchain, code_for, toolchain

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
    return (*FLAGS, *code_for(arch))


def target(configuration: Configuration, tools: Toolchain) -> Path:
    """Where the object lies, built or not: its name has a hash of source, flags, nvcc's and the headers' versions."""
    key = fingerprint(*_recipe(configuration), tools.nvcc_version.encode(), tools.cutlass_version.encode())
    return target_of(f"{configuration.name}-{key}")


def source_of(configuration: Configuration) -> str:
    """A hash of source and flags, which an object's notes have too: what a kernel is, whichever compiler made it."""
    return fingerprint(*_recipe(configuration))


def built_ahead(configuration: Configuration) -> Path | None:
    """An intact object of the kernel in the cache, of any nvcc and headers, the latest of several; None without one."""
    return latest(f"{configuration.name}-*", source_of(configuration))


def is_built(configuration: Configuration) -> bool:
    """Whether :func:`build` would find the object in the cache, intact."""
    try:
        return intact(target(configuration, _tools(configuration.arch)))
    except BuildError:
        return built_ahead(configuration) is not None


def unready(arch: str, kind: str, output: str) -> str | None:
    """None when each kernel that a product may take can be compiled here or is in the cache, else why not.

    Those of the cache are looked at again when something comes or goes there.
    """
    from quartet.kernels.cutlass.toolchain import unavailable

    reason = unavailable(arch)
    if reason is None:
        return None
    try:
        folder = cache_dir(create=False)
    except BuildError as error:
        return f"{reason}; {error}"
    absent = _absent(arch, kind, output, folder, folder.stat().st_mtime_ns if folder.exists() else 0)
    if len(absent) in (0, len(list(table([arch], [kind], output)))):
        return reason if absent else None
    return (f"{reason}; the cache {folder} has others, but not {', '.join(c.name for c in absent)}, which "
            f"`{command(absent[0])}` makes elsewhere")


def command(configuration: Configuration) -> str:
    """What builds a kernel, and those for other shapes, ahead of time."""
    output = "" if configuration.output == "bf16" else f" --output {configuration.output}"
    epilogue = " --bias" * configuration.bias + " --accumulate" * configuration.accumulate
    return f"quartet build --arch {configuration.arch} --kinds {configuration.kind}{output}{epilogue}"


def build(configuration: Configuration, announce: bool = False) -> Build:
    """The kernel's object, compiled if need be: once, however many processes ask, and only when memory has room.

    Without a compiler for it, an object that another machine built from the same source with the same flags.

    Args:
        announce: warn before a compilation, which takes minutes.
    Raises:
        BuildError: the compilation fails, others can write to the cache, or nvcc or the headers are missing or too old
            and the cache has no such object.
    """
    fresh = False
    try:
        tools = _tools(configuration.arch)
    except BuildError as missing:
        found = built_ahead(configuration)
        if found is None:
            raise BuildError(f"the kernel {configuration.name} is not in the cache {cache_dir()}, where "
                             f"`{command(configuration)}` puts it, and cannot be compiled here: {missing}") from missing
        path = found
    else:
        path = target(configuration, tools)
        if announce and not intact(path):
            log.warning("compiling %s with nvcc: one to three minutes, this once; `%s` does it ahead of time",
                        configuration.name, command(configuration))
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


def _recipe(configuration: Configuration) -> tuple[bytes, bytes]:
    return render(configuration).encode(), " ".join(flags(configuration.arch)).encode()


def _tools(arch: str) -> Toolchain:
    """The toolchain of this machine. Raises BuildError where it cannot compile for ``arch``."""
    tools = toolchain()
    tools.check(arch)
    return tools


@lru_cache
def _absent(arch: str, kind: str, output: str, folder: Path, modified: int) -> tuple[Configuration, ...]:
    return tuple(c for c in table([arch], [kind], output) if built_ahead(c) is None)


def _compile(configuration: Configuration, tools: Toolchain, path: Path) -> dict[str, Any]:
    with compile_slot(), tempfile.TemporaryDirectory(prefix="source-", dir=path.parent) as folder:
        source = Path(folder) / f"{configuration.name}.cu"
        source.write_text(render(configuration), encoding="utf-8")
        command = [str(tools.nvcc), *flags(configuration.arch), f"-I{tools.include}", str(source), "-o", str(path)]
        start = time.monotonic()
        said = "".join(run_compiler(command, "CUDA compiler", f"{configuration.name} was not built; {FALLBACK}",
                                    TIMEOUT_SECONDS))
        seconds = time.monotonic() - start
    notes: dict[str, Any] = {"configuration": configuration.name, "source": source_of(configuration),
                             "seconds": round(seconds, 1), **resources(said), "nvcc": tools.nvcc_version,
                             "cutlass": tools.cutlass_version}
    log.info("%s: built in %.0f s, %d registers, %d bytes spilled", configuration.name, seconds, notes["registers"],
             notes["spills"])
    return notes


def resources(said: str) -> dict[str, int]:
    """``registers`` a thread and ``spills`` in bytes (stack, stores and loads), the most of any kernel, of ptxas -v."""
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", said)]
    spills = [sum(map(int, sizes)) for sizes in re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)]
    return {"registers": max(registers, default=0), "spills": max(spills, default=0)}
