"""Low-bit weights one after the other, as DistributedDataParallel joins tensors to send them.

    flat = cat([w.view(-1), …]);  broadcast(flat);  w.copy_(flat.narrow(0, offset, w.numel()).view(w.shape))

is what it does with each bucket (``broadcast_coalesced`` in ``torch/csrc/distributed/c10d/comm.cpp``). What a
:class:`Flat` sends is what its members store: codes and scales, and of plain tensors their numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
_ALIGNED = 16  # bytes, where what a tensor stores begins


class Flat(Tensor):
    """All numbers of some tensors of one dtype, ``[n]``: to be joined, sent, and taken apart where its members meet."""

    @staticmethod
    def __new__(cls, members: Sequence[Tensor]) -> Flat:
        return Tensor._make_wrapper_subclass(cls, (sum(each.numel() for each in members),), dtype=members[0].dtype,
                                             device=members[0].device)

    def __init__(self, members: Sequence[Tensor]) -> None:
        self.members = tuple(members)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Flat({self.numel()} numbers of {len(self.members)} tensors, dtype={self.dtype}, device={self.device})"

    __torch_function__ = torch.nn.Parameter.__torch_function__  # nothing above autograd

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
            cls, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.cat.default:
            return Flat([member for x in args[0] for member in (x.members if isinstance(x, Flat) else (x,))])
        if func is aten.slice.Tensor:
            return _between(args[0], range(args[0].numel())[slice(*args[2:])])
        if func is aten.view.default:
            return _shaped(args[0], list(args[1]))
        if func.name() == "c10d::broadcast_":
            flats, *rest = args
            return flats, func([_gather(flat) for flat in flats], *rest, **(kwargs or {}))[1]
        raise NotImplementedError(f"{func} is not defined on low-bit weights that were joined to be sent to other "
                                  "ranks; weight.dequantize().flatten() has the numbers of one")


def _between(flat: Flat, numbers: range) -> Flat:
    found, at = [], 0
    for member in flat.members:
        if at in numbers:
            found.append(member)
        at += member.numel()
    if sum(member.numel() for member in found) != len(numbers) or numbers.step != 1:
        raise ValueError(f"numbers {numbers.start} to {numbers.stop} are not whole tensors of those that were joined")
    return Flat(found)


def _shaped(flat: Flat, size: list[int]) -> Tensor:
    if len(flat.members) == 1 and (_is_plain(flat.members[0]) or len(size) > 1):
        return flat.members[0].view(size)
    if size not in ([-1], [flat.numel()]):
        raise ValueError(f"{flat!r} has no view of shape {size}")
    return flat


def _gather(flat: Flat) -> Tensor:
    """Copy what the members store into one tensor, uint8, where they lie from now on."""
    members = [(member, _stored(member)) for member in flat.members]
    sizes = [-(-part.nbytes // _ALIGNED) * _ALIGNED for _, stored in members for part in stored.values()]
    whole = torch.empty(sum(sizes), dtype=torch.uint8, device=flat.device)
    places = iter(whole.split(sizes))

    def moved(part: Tensor) -> Tensor:
        return next(places)[:part.nbytes].view(part.dtype).view(part.shape).copy_(part)

    flat.members = tuple(_made(member, {name: moved(part) for name, part in stored.items()})
                         for member, stored in members)
    return whole


def _is_plain(member: Tensor) -> bool:
    return not hasattr(member, "__tensor_flatten__")


def _stored(member: Any) -> dict[str, Tensor]:
    """The plain tensors that a member consists of."""
    if _is_plain(member):
        return {"": member}
    return {name: getattr(member, name) for name in member.__tensor_flatten__()[0]}


def _made(like: Any, stored: dict[str, Tensor]) -> Tensor:
    """A tensor of the kind of ``like`` that consists of these."""
    return stored[""] if _is_plain(like) else type(like).__tensor_unflatten__(stored, like.__tensor_flatten__()[1])
