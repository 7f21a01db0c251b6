"""Which devices this process can use."""

from __future__ import annotations

import torch


def absent(device: torch.device) -> str | None:
    """Why a CUDA device cannot be used in this process; None when it can, or is of another kind."""
    if device.type != "cuda":
        return None
    if not torch.cuda.is_available():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        return f"no CUDA device is here (torch.cuda.is_available() is False; PyTorch is built {built})"
    index, count = device.index or 0, torch.cuda.device_count()
    return None if index < count else f"no such device: {count} CUDA devices are visible, cuda:0 to cuda:{count - 1}"
