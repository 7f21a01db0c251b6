"""Which ranks train one parameter together: what a step has seen of it is maximised over those.

    DistributedDataParallel     its process group
    DTensor                     its mesh: FSDP2, HSDP, tensor parallel
    anything else               this rank alone: a stage of a pipeline, or a process with a model of its own

So ranks that train another stage, or something else, are never waited for. ``reduce_over`` names another group.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quartet.runtime.slots.owners import living

Groups = tuple[Any, ...]  # process groups; a maximum over each, one after the other, is that over all their ranks

_named: Any = None


def reduce_over(group: Any) -> None:
    """Maximise over this process group, whatever wraps a model; ``False``: over none; None: as the model says.

    All its ranks have to step optimizers of the same parameters, and as often.
    """
    global _named
    _named = group


def named() -> Any:
    """What ``reduce_over`` was told last."""
    return _named


def distributed() -> bool:
    """Whether there are ranks to maximise over."""
    return torch.distributed.is_available() and torch.distributed.is_initialized() and _named is not False


def wrappers() -> list[nn.Module]:
    """Modules that live and divide training of what they hold among ranks, without those inside of others."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    found = list(living(_kinds()))
    inside = {id(module) for wrapper in found for module in wrapper.modules() if module is not wrapper}
    return [wrapper for wrapper in found if id(wrapper) not in inside]


def gathering() -> set[int]:
    """``id`` of each module whose parameters FSDP2 may replace by gathered ones."""
    if "torch.distributed.fsdp" not in sys.modules:
        return set()
    sharding = sys.modules["torch.distributed.fsdp"].FSDPModule
    return {id(module) for wrapper in wrappers() if isinstance(wrapper, sharding) for module in wrapper.modules()}


def groups_of(parameter: Tensor, wrapper: nn.Module | None) -> Groups:
    """The groups of a parameter, as its optimizer holds it; empty for this rank alone."""
    if _named is not None:
        return (_named,) if torch.distributed.get_world_size(_named) > 1 else ()
    found = list(_of_mesh(parameter.device_mesh)) if hasattr(parameter, "device_mesh") else []
    if isinstance(wrapper, nn.parallel.DistributedDataParallel):
        found.append(wrapper.process_group)
    return tuple(dict.fromkeys(group for group in found if torch.distributed.get_world_size(group) > 1))


def joins(wrapper: nn.Module | None) -> bool:
    """Whether ranks of the wrapper may have run out of inputs, and take part in what it reduces only."""
    config = getattr(wrapper, "_join_config", None)
    return bool(getattr(config, "enable", False))


def largest(values: Tensor, groups: Groups) -> Tensor:
    """Elementwise over the ranks; values are at least 0."""
    for group in groups:
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, group)
    return values


def union(mine: Sequence[Any], groups: Groups) -> list[Any]:
    """What any rank has, in an order that is the same on all."""
    known = set(mine)
    for group in groups:
        theirs: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(theirs, sorted(known), group)
        known = {entry for rank in theirs for entry in rank}
    return sorted(known)


def _kinds() -> tuple[type, ...]:
    kinds: tuple[type, ...] = (nn.parallel.DistributedDataParallel,)
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return kinds if fsdp is None else (*kinds, fsdp.FSDPModule)


def _of_mesh(mesh: Any) -> Iterator[Any]:
    if mesh.ndim > 1 and mesh.size() == torch.distributed.get_world_size():
        yield torch.distributed.group.WORLD
    else:
        yield from mesh.get_all_groups()
