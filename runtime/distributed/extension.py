"""FSDP2's extension of the all-gather, on plain shards: nothing but what travels is another tensor.

FSDP2 asks the local tensor of a sharded parameter for ``fsdp_pre_all_gather`` and ``fsdp_post_all_gather``. They are
put on that tensor itself, so that parameters, their gradients, optimizer states and state dicts stay as they are.

A shard is quantised once an optimizer step, on the stream that first gathers it; later gathers of the step send the
same codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quartet.runtime.distributed.maxima import Maxima, Scale
from quartet.runtime.distributed.sharded import Sharded
from quartet.runtime.distributed.steps import STEPS, Mark
from quartet.runtime.distributed.weight import GatheredWeight, Packing

Quantize = Callable[[Tensor, Packing, Scale | None], dict[str, Tensor]]


class _Kept(NamedTuple):
    """The planes of a shard as it was, and when they are ready."""

    step: int
    version: int
    planes: dict[str, Tensor]
    mark: Mark


class Packed:
    """One sharded parameter whose codes are gathered.

    Args:
        place: where FSDP2 has it. packing: how it is quantised.
        quantize: (shard ``[rows, in]`` in the dtype of the products, packing, scale) → codes, scales and, where the
            spec has it, mask, as ``quartet::quantize`` gives them.
        maxima: where the scale of the whole tensor is found, if it has one.
    """

    def __init__(self, place: Sharded, packing: Packing, quantize: Quantize, maxima: Maxima) -> None:
        self.place, self.packing = place, packing
        self._quantize, self._maxima = quantize, maxima
        self._number = maxima.add(place, packing.quantizer) if packing.by_tensor else None
        self._kept: _Kept | None = None
        self._placed: _Kept | None = None  # whose planes a group of one rank has in its gathered weight

    def attach(self) -> None:
        """Make FSDP2 ask this object. A parameter that was assigned anew has another local tensor."""
        shard: Any = self.place.shard
        if getattr(shard, "fsdp_pre_all_gather", None) != self.pre:
            shard.fsdp_pre_all_gather, shard.fsdp_post_all_gather = self.pre, self.post

    def pre(self, mesh: Any, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any) -> Any:
        """The bytes that travel; what the shard was quantised as, and ``in``."""
        kept = self._planes(mp_policy.param_dtype)
        return tuple(kept.planes[name].view(torch.uint8) for name in self._travel(kept)), (kept, int(outer_size[1]))

    def post(self, outputs: tuple[Tensor, ...], metadata: Any, param_dtype: torch.dtype, *,
             out: Tensor | None = None) -> Any:
        """The gathered weight, whose planes are FSDP2's own buffers, filled again for each use, and what all ranks
        know. A group of one rank passes on the first buffer alone: the shard's other planes are the whole."""
        kept, cols = metadata
        travel = self._travel(kept)
        alone = travel[len(outputs):]
        if out is None:
            planes = dict(kept.planes) | {name: kept.planes[name].clone() for name in alone}
            for name, plane in zip(travel, outputs, strict=False):
                planes[name] = plane.view(planes[name].dtype)
            self._placed = kept
            return GatheredWeight(planes, self.packing, cols, param_dtype), outputs
        if alone and self._placed is not kept:
            for name in alone:
                getattr(out, name).copy_(kept.planes[name])
            self._placed = kept
        return None

    def _travel(self, kept: _Kept) -> list[str]:
        """The planes of which each rank has its rows."""
        whole = ("scales", "amax") if self.packing.quantizer.block == "tensor" else ("amax",)
        return [name for name in kept.planes if name not in whole]

    @torch.no_grad()
    def _planes(self, dtype: torch.dtype | None) -> _Kept:
        shard = self.place.shard
        if self._kept is not None and (self._kept.step, self._kept.version) == (STEPS.number, shard._version):
            self._kept.mark.follow(self._kept.planes.values())
            return self._kept
        scale = None if self._number is None else self._maxima.of(self._number)
        planes = self._quantize(shard if dtype is None else shard.to(dtype), self.packing, scale)
        if scale is not None and self.packing.quantizer.block == "tensor":
            planes["scales"] = scale.scale
        elif scale is not None:
            planes["amax"] = scale.amax
        self._kept = _Kept(STEPS.number, shard._version, planes, Mark(shard.device))
        return self._kept
