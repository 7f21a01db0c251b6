"""Where the random bits of a step come from: one seed a graph and device from PyTorch's generator, and a stream a rank.

Turning the backend on should leave the user's own random numbers as they are, so a seed is a digest of the generator's
state where that is enough: where the same forward also draws numbers of the user's, so that no two forwards find one
state. Else a seed is drawn. A count of our own would tell forwards apart as well, but ``torch.manual_seed`` would not
begin it anew, and a restored generator state would not continue it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch


def draw(device: torch.device, moves: bool = False) -> torch.Tensor:
    """``quartet::seed``: int64 ``[1]`` in 0…2^62−1.

    ``moves``: whoever asks also moves the device's generator by numbers of the user's, every time. The seed is then a
    function of the generator's state, which stays as it is; otherwise it is drawn as ``torch.randint`` draws. A CUDA
    graph that is being captured draws too: its replays see no state.
    """
    state = _state(device) if moves else None
    if state is None:
        return torch.randint(0, 2**62, [1], dtype=torch.int64, device=device)
    digest = hashlib.sha256(b"quartet" + state.numpy().tobytes()).digest()
    return torch.full([1], int.from_bytes(digest[:8], "little") >> 2, dtype=torch.int64, device=device)


def _state(device: torch.device) -> torch.Tensor | None:
    """State of the device's generator, bytes; None where it cannot be read."""
    if device.type == "cpu":
        return torch.get_rng_state()
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        return torch.cuda.get_rng_state(device)
    return None


def data_parallel_stream(inputs: Sequence[Any]) -> int:
    """A number that differs between data-parallel ranks and agrees within a tensor-parallel group.

    Ranks that hold shards of one tensor must round what they replicate alike, so a group of ranks whose
    inputs are DTensors on one mesh takes the mesh's lowest rank; otherwise it is the global rank.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0
    from torch.distributed.tensor import DTensor

    ranks = [int(t.device_mesh.mesh.min()) for t in inputs if isinstance(t, DTensor)]
    return min(ranks) if ranks else torch.distributed.get_rank()
