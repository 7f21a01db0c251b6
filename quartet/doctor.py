"""What this machine has: versions, compilers, devices, and which kernel serves which format on each."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby

import torch

PACKAGES = ("torch-quartet", "torch", "triton", "nvidia-cutlass", "sympy", "networkx", "numpy")
COMPILERS = ("g++", "nvcc")
REMEDY = {
    "triton": "comes with CUDA builds of torch",
    "nvidia-cutlass": "pip install 'torch-quartet[cutlass]' for the CUTLASS kernels",
    "g++": "the fused C++ kernels for a CPU need it",
    "nvcc": "building CUTLASS kernels needs it; it comes with the CUDA toolkit",
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
    """(name, version line and path, or what it is missed for)."""
    for name in COMPILERS:
        path = shutil.which(name)
        if path is None:
            yield name, f"missing ({REMEDY[name]})"
            continue
        try:
            said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout.splitlines()
            line = next((text for text in said if "release" in text), said[0] if said else "no version")
        except (OSError, subprocess.SubprocessError) as error:
            line = f"does not run: {error}"
        yield name, f"{line.strip()}  {path}"


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


def doctor() -> tuple[str, bool]:
    """The whole report, and whether every device has a kernel for at least one format."""
    from quartet.lowering.registry import probe

    out = ["versions", table(list(packages())), "compilers", table(list(compilers()))]
    healthy = True
    for device, description in devices():
        out.append(f"{device} ({description})")
        try:
            probed = probe(device)
        except Exception as error:
            out.append(f"  probing failed: {type(error).__name__}: {error}")
            healthy = False
            continue
        rows = [("format", "kernel", "")]
        for _, group in groupby(probed, key=lambda row: row[0]):
            for i, (format, kernel, reason) in enumerate(group):
                rows.append(("" if i else format, kernel, "yes" if reason is None else f"no: {reason}"))
        out.append(table(rows))
        healthy = healthy and any(reason is None for _, _, reason in probed)
    return "\n".join(out), healthy
