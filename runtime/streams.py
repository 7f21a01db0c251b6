"""Which random stream a rank draws from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


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
