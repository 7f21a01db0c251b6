"""What kernels are chosen for: a device of this process, or one that is only named, and what it can do."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from quartet.runtime import gpus
from quartet.runtime.gpus import Gpu


@dataclass(frozen=True)
class Feature:
    """Something that kernels ask of a device, and what is said where it is not there; None: nobody misses it.

    Args:
        has: whether an NVIDIA GPU of a compute capability has it. without: said of one that has not, with its numbers.
        elsewhere: said of what is no GPU, with its name. foreign: of a GPU that is not NVIDIA's.
    """

    has: Callable[[tuple[int, int]], bool]
    without: str
    elsewhere: str | None
    foreign: str | None


_BLOCK_SCALED = "block-scaled tensor cores are on NVIDIA GPUs"
_GROUPED = "PyTorch has FP8 products of batches and groups for compute capability 9.0 only"
FEATURES = {
    "nvidia instructions": Feature(
        lambda capability: True, "", "runs on a GPU, not on {}", "the Triton quantisers hold NVIDIA instructions"),
    "int8 tensor cores": Feature(
        lambda capability: capability >= (7, 5),
        "INT8 tensor cores need compute capability 7.5 or more, this device has {}.{}",
        "multiplies INT8 on NVIDIA GPUs and CPUs, not on {}", "written for NVIDIA's INT8 tensor cores"),
    "fp8 tensor cores": Feature(
        lambda capability: capability >= (8, 9),
        "FP8 tensor cores need compute capability 8.9 or more, this device has {}.{}",
        "FP8 tensor cores are on NVIDIA GPUs, not on {}", "written for NVIDIA's FP8 formats"),
    "fp8 conversions": Feature(
        lambda capability: capability >= (8, 9),
        "Triton converts to both FP8 formats from compute capability 8.9 on, this device has {}.{}", None, None),
    "fp8 grouped products": Feature(
        lambda capability: capability[0] == 9, _GROUPED + ", not {}.{}", _GROUPED + ", not this device", _GROUPED),
    "fp8 block scales": Feature(
        lambda capability: capability[0] == 9,
        "cuBLASLt has FP8 products with fp32 scales of blocks for compute capability 9.0 only, not {}.{}",
        _BLOCK_SCALED + ", not on {}", _BLOCK_SCALED),
    "block-scaled tensor cores": Feature(
        lambda capability: capability in ((10, 0), (10, 3), (12, 0), (12, 1)),
        "block-scaled tensor cores need compute capability 10.0, 10.3, 12.0 or 12.1, not {}.{}",
        _BLOCK_SCALED + ", not on {}", _BLOCK_SCALED),
}


@dataclass(frozen=True)
class Target:
    """A device as the choice of kernels sees it.

    Args:
        type: ``"cuda"`` (ROCm's too), ``"cpu"``, … as of a ``torch.device``.
        architecture: of a GPU as its compiler calls it, ``"sm_90"`` or ``"gfx950"``; None where it is not known.
        missing: why this process cannot use it; None when it can.
        pretended: nothing will run: compile as for such a device.
        name: of a GPU, as its driver or :meth:`named` was told; None of an architecture.
        gpu: what is known of its speed.
    """

    type: str
    architecture: str | None = None
    missing: str | None = None
    pretended: bool = False
    name: str | None = None
    gpu: Gpu | None = None

    @staticmethod
    def of(device: torch.device | Target) -> Target:
        """The target that a device is."""
        if isinstance(device, Target):
            return device
        missing = absent(device)
        if device.type != "cuda" or missing is not None:
            return Target(device.type, None, missing)
        if torch.version.hip is not None:
            return Target("cuda", torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0])
        properties = torch.cuda.get_device_properties(device)
        return Target("cuda", f"sm_{properties.major}{properties.minor}", name=properties.name, gpu=gpus.of(properties))

    @staticmethod
    def named(name: str) -> Target:
        """``"cpu"``, a GPU by its name, ``"h100"``, ``"rtx 3090"``, or an architecture as its compiler calls it,
        ``"sm_90"``, ``"sm_100a"``, ``"gfx950"``, of which the usual GPU is taken.

        Raises:
            ValueError: another name; the message has all that are possible.
        """
        architecture, gpu = gpus.target(str(name))
        if architecture is None:
            return Target("cpu", pretended=True)
        return Target("cuda", architecture, pretended=True, name=str(name) if gpus.named(str(name)) else None, gpu=gpu)

    @property
    def title(self) -> str:
        """What it is called: its name where there is one."""
        return self.name or str(self)

    @property
    def capability(self) -> tuple[int, int] | None:
        """Compute capability of an NVIDIA GPU, else None."""
        match = re.fullmatch(r"sm_(\d+)(\d)", self.architecture or "")
        return None if match is None else (int(match[1]), int(match[2]))

    @property
    def foreign(self) -> str | None:
        """Why it is no NVIDIA GPU; None where it is one, or no GPU."""
        if self.architecture is None:
            amd = self.type == "cuda" and not self.pretended and torch.version.hip is not None
        else:
            amd = self.architecture.startswith("gfx")
        return None if not amd else f"{self} is AMD's" if self.pretended else "this PyTorch is built for ROCm"

    @property
    def features(self) -> frozenset[str]:
        """What of ``FEATURES`` it has."""
        return frozenset(name for name in FEATURES if self.lacks(name) is None)

    def lacks(self, name: str) -> str | None:
        """None where it has a feature, one of ``FEATURES``, else why not."""
        feature = FEATURES[name]
        if self.type == "cpu" and name == "int8 tensor cores":
            return None if self.pretended else _slow_integers()
        if self.type != "cuda":
            return feature.elsewhere and feature.elsewhere.format(self)
        if self.foreign is not None:
            return feature.foreign and f"{feature.foreign}; {self.foreign}"
        if self.capability is None:
            return feature.foreign and (self.missing or f"the architecture of {self} is not known")
        return None if feature.has(self.capability) else feature.without.format(*self.capability)

    def __str__(self) -> str:
        return self.architecture or self.type


def without_triton(target: Target) -> str | None:
    """None where the Triton kernels of ``kernels/triton`` run, or would with a GPU that is only named, else why not."""
    reason = target.lacks("nvidia instructions")
    if reason is not None:
        return reason
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton is not installed ({error}); it comes with PyTorch's CUDA builds"
    return None


def absent(device: torch.device) -> str | None:
    """Why a CUDA device cannot be used in this process; None when it can, or is of another kind."""
    if device.type != "cuda":
        return None
    if not torch.cuda.is_available():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        return f"no CUDA device is here (torch.cuda.is_available() is False; PyTorch is built {built})"
    index, count = device.index or 0, torch.cuda.device_count()
    return None if index < count else f"no such device: {count} CUDA devices are visible, cuda:0 to cuda:{count - 1}"


def _slow_integers() -> str | None:
    """Why this machine's CPU multiplies integers no faster than floats; None where it does."""
    known = torch.cpu.get_capabilities()
    if any(known.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8")):
        return None
    return "without VNNI or AMX this CPU multiplies integers no faster than floats"
