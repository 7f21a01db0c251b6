"""One seed for all ranks that train a parameter together: copies that round by other bits drift apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from quartet.runtime.slots.ranks.replicas import distributed, groups_of, joins, wrappers


def agree(groups: Sequence[dict[str, Any]], keys: Sequence[str], parameters: Iterable[Tensor]) -> None:
    """Replace the integers under ``keys`` by those of the first rank of each group of ranks that has the parameters:
    DistributedDataParallel's, and those of a mesh. Collective where there is one; nothing while ranks may have run out
    of inputs."""
    if not distributed():
        return
    wrapper = {id(parameter): module for module in wrappers() for parameter in module.parameters()}
    found = {group: parameter.device for parameter in parameters if not joins(wrapper.get(id(parameter)))
             for group in groups_of(parameter, wrapper.get(id(parameter)))}
    places = [(group, key) for group in groups for key in keys if isinstance(group.get(key), int)]
    for ranks, device in found.items():
        seeds = torch.tensor([group[key] for group, key in places], dtype=torch.int64, device=device)
        torch.distributed.broadcast(seeds, torch.distributed.get_global_rank(ranks, 0), group=ranks)
        for (group, key), seed in zip(places, seeds.tolist(), strict=True):
            group[key] = seed
