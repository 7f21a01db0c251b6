"""FSDP2's extension of the all-gather, on plain shards: nothing but what travels is another tensor.

FSDP2 asks the local tensor of a sharded parameter for ``fsdp_pre_all_gather`` and ``fsdp_post_all_gather``. They are
put on that tensor itself, so that parameters, their gradients, optimizer states and state dicts stay as they are.

All shards are quantised before a forward, one after the other on its stream; the gathers of the step send what was
made. Forwards share it while gradients accumulate, and only then: PyTorch counts no write to a DTensor through
``parameter.data``, ``torch._foreach_…`` and ``torch.distributed.checkpoint.load``, which swap averages in for an
evaluation or put a checkpoint in the place of a step that went wrong.

FSDP2 calls both for each parameter and gather, hundreds of times a step, and asks for the signature of the first each
time: they hand over what is there, and carry their signature.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quartet.runtime.distributed.maxima import Maxima, Scale
from quartet.runtime.distributed.sharded import Sharded
from quartet.runtime.distributed.weight import GatheredWeight, Packing
from quartet.runtime.optimizer_steps import OPTIMIZER_STEPS

Quantize = Callable[[Tensor, Packing, Scale | None], dict[str, Tensor]]


@dataclass(frozen=True, eq=False)
class _Kept:
    """A shard as it was at a version, its planes, and those of which each rank has its rows, as bytes."""

    shard: Tensor
    version: tuple[int, ...]
    planes: dict[str, Tensor]
    travel: dict[str, Tensor]

    def is_of(self, place: Sharded) -> bool:
        return self.version == place.version


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
        self._whole = ("scales", "amax") if packing.quantizer.block == "tensor" else ("amax",)
        self._kept: _Kept | None = None
        self._alone: Sequence[str] = ()  # planes that a group of one rank does not pass on
        self._placed: _Kept | None = None  # whose they are in the gathered weight
        self._pre, self._post = self._functions()

    def attach(self) -> Tensor:
        """Make FSDP2 ask this object, and return the shard. A parameter that was assigned anew has another."""
        shard: Any = self.place.shard
        if getattr(shard, "fsdp_pre_all_gather", None) is not self._pre:
            shard.fsdp_pre_all_gather, shard.fsdp_post_all_gather = self._pre, self._post
        return shard

    def refresh(self, anew: bool) -> bool:
        """Quantise the shard, ``anew`` also where that was done; whether it was done now."""
        shard, kept = self.attach(), self._kept
        if not anew and kept is not None and kept.is_of(self.place):
            return False
        self._make(shard)
        return True

    @torch.no_grad()
    def _make(self, shard: Tensor) -> _Kept:
        scale = None if self._number is None else self._maxima.of(self._number)
        dtype = self.place.dtype
        planes = self._quantize(shard if dtype is None else shard.to(dtype), self.packing, scale)
        if scale is not None and self.packing.quantizer.block == "tensor":
            planes["scales"] = scale.scale
        elif scale is not None:
            planes["amax"] = scale.amax
        travel = {name: plane.view(torch.uint8) for name, plane in planes.items() if name not in self._whole}
        self._kept = _Kept(shard, self.place.version, planes, travel)
        return self._kept

    def _functions(self) -> tuple[Callable[..., Any], Callable[..., Any]]:

        def pre(mesh: Any, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any) -> Any:
            """The bytes that travel, and what they are of."""
            kept = self._kept
            if kept is None or not kept.is_of(self.place):
                kept = self._make(self.place.shard)
                self.place.follow()
            return tuple(kept.travel.values()), kept

        def post(outputs: tuple[Tensor, ...], metadata: _Kept, param_dtype: torch.dtype, *,
                 out: Tensor | None = None) -> Any:
            """The gathered weight. Its planes are FSDP2's own buffers, filled again for each use, and what all ranks
            know. A group of one rank passes on the first buffer alone: the shard's other planes are the whole."""
            if out is None:
                return self._gathered(outputs, metadata, param_dtype)
            if self._alone and self._placed is not metadata:
                for name in self._alone:
                    getattr(out, name).copy_(metadata.planes[name])
                self._placed = metadata
            return None

        for function in (pre, post):
            function.__signature__ = inspect.signature(function)
        return pre, post

    def _gathered(self, outputs: tuple[Tensor, ...], kept: _Kept, dtype: torch.dtype) -> Any:
        travel = list(kept.travel)
        self._alone, self._placed = travel[len(outputs):], kept
        planes = dict(kept.planes) | {name: kept.planes[name].clone() for name in self._alone}
        for name, plane in zip(travel, outputs, strict=False):
            planes[name] = plane.view(planes[name].dtype)
        return GatheredWeight(planes, self.packing, int(self.place.parameter.shape[1]), dtype), outputs


class Refresh:
    """What is done before each forward of a model: find the scales and quantise the shards of this step."""

    def __init__(self, packed: Sequence[Packed], maxima: Maxima) -> None:
        self._packed, self._maxima = packed, maxima
        self._trained, self._writes = False, OPTIMIZER_STEPS.writes

    def __call__(self) -> None:
        """Collective where there are scales."""
        trained, self._trained = self._trained, torch.is_grad_enabled()
        accumulating = any(each.place.parameter.grad is not None for each in self._packed)
        before, self._writes = self._writes, OPTIMIZER_STEPS.writes
        anew = before != self._writes or not (trained and self._trained and accumulating)
        with torch.inference_mode(False), torch.no_grad():  # training may read what an evaluation has made
            for each in self._packed:
                each.attach()
            self._maxima.refresh(anew)
            if any([each.refresh(anew) for each in self._packed]):
                self._packed[0].place.follow()
