"""Where the random bits of a step come from: one seed a graph from PyTorch's generator, and a stream a rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx.node import has_side_effect

library = torch.library.Library("quartet", "FRAGMENT")
library.define("seed(Device device) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))


def draw(device: torch.device) -> torch.Tensor:
    """``quartet::seed``: int64 ``[1]``, uniform in 0…2^62−1, from the device's generator as ``torch.randint`` draws."""
    return torch.randint(0, 2**62, [1], dtype=torch.int64, device=device)


library.impl("seed", draw, "CompositeExplicitAutograd")
torch.library.register_fake("quartet::seed", lambda device: torch.empty(1, dtype=torch.int64, device=device),
                            lib=library)
# Drawing is a side effect of the forward. The partitioner would otherwise move it into backward, where the bits
# would depend on what else drew in between and a retained graph would not replay them.
SEED = has_side_effect(torch.ops.quartet.seed.default)


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
