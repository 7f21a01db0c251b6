"""What this machine has: versions, compilers, devices, and which kernel serves which format on each."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path

import torch

from quartet.kernels.build_cache import BuildError
from quartet.kernels.cpu.build import compiler
from quartet.kernels.cutlass import toolchain
from quartet.runtime.devices import Target
from quartet.runtime.replay.library import LAUNCHER

PACKAGES = ("torch-quartet", "torch", "triton", "sympy", "networkx", "numpy")
REMEDY = {
    "triton": "`pip install triton`; CUDA builds of torch bring it",
    "g++": "`apt-get install g++`, or point CXX at one: the fused C++ kernels for a CPU need it",
}


def table(rows: Sequence[Sequence[str]], indent: str = "  ") -> str:
    """Rows as left-aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join((indent + line).rstrip() for line in lines)


def packages() -> Iterator[tuple[str, str]]:
    """(name, version or how to get it) of Python and the packages that matter."""
    yield "python", platform.python_version()
    for name in PACKAGES:
        try:
            yield name, torch.__version__ if name == "torch" else version(name)
        except PackageNotFoundError:
            yield name, f"missing{f' ({REMEDY[name]})' if name in REMEDY else ''}"


def compilers() -> Iterator[tuple[str, str]]:
    """(name, version and path, or how to get it) of what compiles kernels, and of what it reads; what launches them."""
    yield "g++", _gxx()
    yield "nvcc", _found(toolchain.find_nvcc, toolchain.nvcc_version)
    yield "CUTLASS", _found(toolchain.find_headers, toolchain.cutlass_version)
    yield "launches", LAUNCHER.status()


def _gxx() -> str:
    try:
        command = compiler()
    except BuildError as error:
        return str(error)
    path = shutil.which(command[0])
    if path is None:
        return f"{'' if command == ['g++'] else f'{command[0]} is '}missing ({REMEDY['g++']})"
    try:
        done = subprocess.run([path, *command[1:], "--version"], capture_output=True, text=True, timeout=20)
        said = done.stdout.splitlines()
    except (OSError, subprocess.SubprocessError) as error:
        return f"does not run: {error}  {path}"
    return f"{said[0].strip() if said else 'no version'}  {path}"


def _found(find: Callable[[], Path], version_of: Callable[[Path], str]) -> str:
    try:
        path = find()
        return f"{version_of(path)}  {path}"
    except BuildError as error:
        return str(error)


def devices() -> Iterator[tuple[torch.device, str]]:
    """(device, its name and capability)."""
    yield torch.device("cpu"), f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, " \
                               f"{torch.get_num_threads()} threads"
    for index in range(torch.cuda.device_count()):
        try:
            gpu = torch.cuda.get_device_properties(index)
            said = f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
        except (AssertionError, RuntimeError) as error:
            said = f"does not answer: {str(error).splitlines()[0]}"
        yield torch.device("cuda", index), said


def doctor(target: str | None = None) -> tuple[str, bool]:
    """The whole report, and whether every device has a kernel for at least one format.

    ``target``: of such a device, ``"sm_100a"``, as if it were here, and not of those that are. Raises ValueError where
    there is no such.
    """
    from quartet.lowering.ir.providers import listing
    from quartet.lowering.rates import rates_of
    from quartet.lowering.registry import probe

    shown: Iterable[tuple[torch.device | Target, str]] = devices()
    if target is not None:
        shown = [(Target.named(target), "pretended, with every compiler")]
    out = ["versions", table(list(packages())), "compilers", table(list(compilers()))]
    healthy = True
    for device, description in shown:
        out.append(f"{device} ({description})")
        if (rates := rates_of(Target.of(device))) is not None:
            out.append(f"  what the default quantises is decided by {rates.source}")
        try:
            probed = probe(device)
        except Exception as error:
            out.append(f"  probing failed: {type(error).__name__}: {error}")
            healthy = False
            continue
        rows = [("format", "kernel", "")]
        for format, group in groupby(probed, key=lambda row: row[0]):
            rows += _order(format, [(kernel, reason) for _, kernel, reason in group])
        out.append(table(rows))
        rows = [("op", "provider", "")]
        for op, group in groupby(listing(Target.of(device)), key=lambda row: row[0]):
            rows += _order(op, [(provider, reason) for _, provider, reason in group])
        out.append(table(rows))
        healthy = healthy and any(reason is None for _, _, reason in probed)
    return "\n".join(out), healthy


def _order(format: str, kernels: Sequence[tuple[str, str | None]]) -> Iterator[tuple[str, str, str]]:
    """The rows of a format or an op: the first that takes it is what it gets."""
    chosen = next((kernel for kernel, reason in kernels if reason is None), None)
    for i, (kernel, reason) in enumerate(kernels):
        said = f"no: {reason}" if reason is not None else "yes, chosen" if kernel == chosen else "yes"
        yield "" if i else format, kernel, said
