"""What this machine has: versions, compilers, devices, and which kernel serves which format on each."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
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


@dataclass
class Device:
    """A device of the machine, or a pretended one.

    Attributes:
        rates: by what the default decides; empty where it decides nothing. failure: why its kernels are not known.
        formats: format → (kernel, why not or None) in order of preference. ops: op → (provider, why not or None).
    """

    name: str
    description: str
    gpu: bool
    rates: str = ""
    failure: str = ""
    formats: dict[str, list[tuple[str, str | None]]] = field(default_factory=dict)
    ops: dict[str, list[tuple[str, str | None]]] = field(default_factory=dict)

    @property
    def healthy(self) -> bool:
        """Whether some format has a kernel."""
        return any(reason is None for kernels in self.formats.values() for _, reason in kernels)

    def lines(self, verbose: bool) -> Iterator[str]:
        """What the table says of it."""
        yield f"{self.name} ({self.description})"
        if self.rates:
            yield f"  what the default quantises is decided by {self.rates}"
        if self.failure:
            yield f"  probing failed: {self.failure}"
        elif not verbose:
            rows = [("format", "kernel"), *((format, _chosen(kernels)) for format, kernels in self.formats.items())]
            yield table(rows)
        else:
            for kind, what in (("format", self.formats), ("op", self.ops)):
                yield table([(kind, "kernel" if kind == "format" else "provider", ""),
                             *(row for name, kernels in what.items() for row in _order(name, kernels))])


@dataclass
class Diagnosis:
    """What ``quartet doctor`` found."""

    packages: list[tuple[str, str]]
    compilers: list[tuple[str, str]]
    devices: list[Device]
    pretended: bool

    @property
    def healthy(self) -> bool:
        """Whether every device has a kernel for at least one format."""
        return all(device.healthy for device in self.devices)

    @property
    def verdict(self) -> str:
        """One sentence."""
        bad = [device.name for device in self.devices if not device.healthy]
        if bad:
            return f"Not ready: nothing is quantised on {' and '.join(bad)}, for the reasons above (-v has all)."
        gpus = [device for device in self.devices if device.gpu]
        if not gpus:
            return ("Ready, as a simulation: numbers and memory of low precision are real on a CPU, its speed is not; "
                    "`quartet explain … --target h100` shows what a GPU would run.")
        formats = [name for name, kernels in gpus[0].formats.items() if _fast(kernels)]
        fast = f"{', '.join(formats)} on tensor cores" if formats else "no format on tensor cores"
        name = gpus[0].name
        return f"{name} would multiply {fast}." if self.pretended else f"Ready: {name} multiplies {fast}."

    def text(self, verbose: bool) -> str:
        """The report; ``verbose``: every kernel and op with its reasons, and all versions."""
        head = (["versions", table(self.packages)] if verbose else
                [", ".join(f"{name} {said}" for name, said in self.packages if name in ("torch-quartet", "torch"))])
        return "\n".join([*head, "compilers", table(self.compilers),
                          *(line for device in self.devices for line in device.lines(verbose)), self.verdict])

    def as_dict(self) -> dict[str, object]:
        """The same, JSON-serialisable."""
        return {"versions": dict(self.packages), "compilers": dict(self.compilers), "healthy": self.healthy,
                "verdict": self.verdict, "devices": [asdict(device) for device in self.devices]}


def doctor(target: str | None = None) -> Diagnosis:
    """Look at this machine.

    ``target``: of such a device, ``"sm_100a"``, as if it were here, and not of those that are. Raises ValueError where
    there is no such.
    """
    shown: Iterable[tuple[torch.device | Target, str]] = devices()
    if target is not None:
        shown = [(Target.named(target), "pretended, with every compiler")]
    return Diagnosis(list(packages()), list(compilers()), [_probe(*one) for one in shown], target is not None)


def _probe(device: torch.device | Target, description: str) -> Device:
    from quartet.lowering.ir.providers import listing
    from quartet.lowering.rates import rates_of
    from quartet.lowering.registry import probe

    found = Device(str(device), description, device.type == "cuda")
    if (rates := rates_of(Target.of(device))) is not None:
        found.rates = rates.source
    try:
        for format, kernel, reason in probe(device):
            found.formats.setdefault(format, []).append((kernel, reason))
    except Exception as error:
        found.failure = f"{type(error).__name__}: {error}"
        return found
    for op, provider, reason in listing(Target.of(device)):
        found.ops.setdefault(op, []).append((provider, reason))
    return found


def _chosen(kernels: Sequence[tuple[str, str | None]]) -> str:
    """The first that takes a format, or why none does."""
    first = next((kernel for kernel, reason in kernels if reason is None), None)
    return first or f"none: {'; '.join(f'{kernel}: {reason}' for kernel, reason in kernels)}"


def _fast(kernels: Sequence[tuple[str, str | None]]) -> bool:
    """Whether a format is multiplied as it is quantised."""
    return not _chosen(kernels).startswith(("none:", "inductor", "triton", "cpp", "grouped-mm")) or (
        _chosen(kernels) == "triton-fp8")


def _order(format: str, kernels: Sequence[tuple[str, str | None]]) -> Iterator[tuple[str, str, str]]:
    """The rows of a format or an op: the first that takes it is what it gets."""
    chosen = next((kernel for kernel, reason in kernels if reason is None), None)
    for i, (kernel, reason) in enumerate(kernels):
        said = f"no: {reason}" if reason is not None else "yes, chosen" if kernel == chosen else "yes"
        yield "" if i else format, kernel, said
