"""What kernels are chosen for: a device of this process, or one that is only named."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121")


@dataclass(frozen=True)
class Target:
    """A device as the choice of kernels sees it.

    Args:
        type: ``"cuda"``, ``"cpu"``, … as of a ``torch.device``.
        capability: compute capability of an NVIDIA GPU, else None.
        missing: why this process cannot use it; None when it can.
        pretended: nothing will run: compile as for such a device.
    """

    type: str
    capability: tuple[int, int] | None = None
    missing: str | None = None
    pretended: bool = False

    @staticmethod
    def of(device: torch.device | Target) -> Target:
        """The target that a device is."""
        if isinstance(device, Target):
            return device
        missing = absent(device)
        if device.type != "cuda" or missing is not None or torch.version.hip is not None:
            return Target(device.type, None, missing)
        return Target("cuda", torch.cuda.get_device_capability(device))

    @staticmethod
    def named(name: str) -> Target:
        """``"cpu"``, or an NVIDIA architecture as ``nvcc`` calls it: ``"sm_90"``, ``"sm_100a"``. Raises ValueError."""
        if name == "cpu":
            return Target("cpu", pretended=True)
        match = re.fullmatch(r"sm_(\d+)(\d)[af]?", str(name))
        if match is None or name.rstrip("af") not in ARCHITECTURES:
            raise ValueError(f"there is no target {name!r}; possible: cpu, {', '.join(ARCHITECTURES)}")
        return Target("cuda", (int(match[1]), int(match[2])), pretended=True)

    def __str__(self) -> str:
        return self.type if self.capability is None else "sm_{}{}".format(*self.capability)


def absent(device: torch.device) -> str | None:
    """Why a CUDA device cannot be used in this process; None when it can, or is of another kind."""
    if device.type != "cuda":
        return None
    if not torch.cuda.is_available():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        return f"no CUDA device is here (torch.cuda.is_available() is False; PyTorch is built {built})"
    index, count = device.index or 0, torch.cuda.device_count()
    return None if index < count else f"no such device: {count} CUDA devices are visible, cuda:0 to cuda:{count - 1}"
