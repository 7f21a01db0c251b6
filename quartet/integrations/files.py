"""Quartet's state of a model as a file in the folder of a checkpoint, one a rank."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from quartet.kernels.files import expanded
from quartet.runtime.slots.state import load_state_dict, state_dict
from quartet.runtime.streams import rank


def file_of(folder: str | Path) -> Path:
    """Where this rank's state is."""
    return expanded(folder) / f"quartet_state_{rank()}.pt"


def save(model: nn.Module, folder: str | Path) -> None:
    """Write what :func:`quartet.state_dict` has, also where that is nothing. All ranks call it."""
    state = state_dict(model)
    file_of(folder).parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, file_of(folder))


def load(model: nn.Module, folder: str | Path) -> bool:
    """Put back what :func:`save` wrote for this rank; False where there is no such file.

    Raises:
        ValueError: the state is of another model, or the file holds none.
    """
    file = file_of(folder)
    if not file.exists():
        return False
    try:
        state = torch.load(file, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of whichever kind: the unpickler follows the bytes that are there
        raise ValueError(f"{file} is damaged: torch.load cannot read it ({type(error).__name__}); resume from another "
                         "checkpoint, or remove the file, and histories begin anew") from error
    load_state_dict(model, state)
    return True
