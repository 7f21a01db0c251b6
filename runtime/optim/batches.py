"""Parameters that one run of the kernels steps together, and what tells that they are still the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from quartet.kernels.reference.optim.optimizers import Kind
from quartet.runtime.optim import layout as place
from quartet.runtime.optim.runners import Item, Reduction, Runner, runner


class Member(NamedTuple):
    """A parameter, its states under their ``names``, and its number among all that the optimizer holds."""

    param: Tensor
    kind: Kind
    state: dict[str, Tensor]
    names: Sequence[str]
    site: int


@dataclass
class Batch:
    """Parameters of one device, dtype and kind."""

    runner: Runner
    parameters: list[Tensor]
    orders: list[tuple[int, ...] | None]  # of the dimensions in memory, where it is not their own
    empty: list[bool]

    def gradients(self) -> list[Tensor]:
        """This rank's parts, in the order in memory of the parameters; none of empty ones."""
        found = []
        for param, order, empty in zip(self.parameters, self.orders, self.empty, strict=True):
            if not empty:
                grad: Any = param.grad
                if isinstance(grad, DTensor):
                    grad = place.alike(grad, param)
                found.append((grad if order is None else grad.permute(order)).contiguous())
        return found


def gathered(members: Iterable[Member]) -> list[Batch]:
    """The fewest batches that hold all members, whose states fit them."""
    together: dict[Any, list[tuple[Tensor, Item, tuple[int, ...]]]] = {}
    for param, kind, state, names, site in members:
        part, order = place.dense(place.local(param.detach()))
        tiles = place.layout(param, kind)
        codes = tuple(place.local(state[n]).permute(order) for n in names)
        scales = tuple(place.local(state[f"{n}_scale"]) if f"{n}_scale" in state else None for n in names)
        item = Item(part, codes, scales, state["step"], tiles, site, place.first_group(param, kind))
        groups = place.shard_groups(param) if kind.per_tensor else []
        assert param.grad is not None
        key = (kind, param.device, param.dtype, param.grad.dtype, tiles.width % tiles.tile == 0, *map(id, groups))
        together.setdefault(key, []).append((param, item, order))
    return [_batch(key[0], key[3], found) for key, found in together.items()]


def _batch(kind: Kind, gradient: torch.dtype, members: Sequence[tuple[Tensor, Item, tuple[int, ...]]]) -> Batch:
    params, items, orders = zip(*members, strict=True)
    reduce = Reduction(kind, [item.scales for item in items], place.shard_groups(params[0]))
    full = [item for item in items if item.param.numel()]
    return Batch(runner(kind, full, reduce, params[0].device, gradient), list(params),
                 [None if order == tuple(range(len(order))) else order for order in orders],
                 [not item.param.numel() for item in items])


def seen(param: Tensor, grad: Tensor, state: Iterable[Any]) -> tuple[Any, ...]:
    """What a batch depends on of a parameter; every step asks for it, so nothing is read that does not have to be."""
    ids = [id(param), *map(id, state)]
    if isinstance(param, DTensor):
        param, state = param.to_local(), [place.local(x) for x in state]
    return (*ids, param.data_ptr(), param.shape, param.stride(), grad.dtype, grad.layout, grad.shape,
            *[x.data_ptr() for x in state if isinstance(x, Tensor)])
