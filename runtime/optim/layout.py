"""How a parameter, sharded or not, falls into tiles, and which state format it can have.

A block of a state lies within one index of the first dimension, so that a shard along it holds whole blocks and its
scales are sharded like the codes: a checkpoint can be resharded at any row. What has no such rows, one-dimensional
tensors above all, keeps fp32 states in the formats with blocks, sharded or not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from quartet.kernels.reference.optim.optimizers import WEIGHT_GROUP, Kind
from quartet.kernels.reference.optim.state_format import StateFormat
from quartet.kernels.reference.optim.states import Layout


@dataclass(frozen=True)
class Reason:
    """Why a parameter keeps fp32 states."""

    text: str


def local(x: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


def alike(grad: DTensor, param: Tensor) -> Tensor:
    """This rank's part of a gradient, sharded as its parameter is: tensor parallelism leaves sums still to be made."""
    if isinstance(param, DTensor) and grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)
    return grad.to_local()


def like(param: Tensor, part: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``part`` as this rank's part of a tensor of global ``shape``, sharded as ``param`` is."""
    if not isinstance(param, DTensor):
        return part
    strides = torch.empty(shape, dtype=torch.float32, device="meta").stride()
    return DTensor.from_local(part, param.device_mesh, param.placements, run_check=False, shape=torch.Size(shape),
                              stride=strides)


def dense(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """A contiguous view with the dimensions in the order of their strides, and that order.

    Raises:
        ValueError: the tensor has gaps or overlaps, so that no view of it is contiguous.
    """
    if x.is_contiguous():
        return x, tuple(range(x.dim()))
    order = tuple(sorted(range(x.dim()), key=lambda d: (-x.stride()[d], d)))
    view = x.permute(order)
    if not view.is_contiguous():
        raise ValueError(f"a parameter of shape {list(x.shape)} with strides {list(x.stride())} has gaps or overlaps; "
                         "give the optimizer a contiguous one (p.data = p.data.contiguous())")
    return view, order


def shard_dims(param: Tensor) -> list[int]:
    """Dimensions along which a DTensor is sharded."""
    if not isinstance(param, DTensor):
        return []
    return [p.dim for p in param.placements if isinstance(p, Shard)]


def shard_groups(param: Tensor) -> list[Any]:
    """The process groups over which a DTensor is sharded."""
    if not isinstance(param, DTensor):
        return []
    return [param.device_mesh.get_group(i) for i, p in enumerate(param.placements) if isinstance(p, Shard)]


def declined(param: Tensor, form: StateFormat) -> Reason | None:
    """None when a state of ``param`` can be stored as ``form``, else why not."""
    if form.block is None:
        return None
    _, width = _rows(param.shape)
    dims = shard_dims(param)
    if param.dim() < 2 or width < form.block // 2:
        return Reason(f"a parameter of shape {list(param.shape)} has rows shorter than half a block of {form.block}")
    if not any(dims) or not isinstance(param, DTensor):
        return None
    ways = math.prod(param.device_mesh.size(i) for i, p in enumerate(param.placements)
                     if isinstance(p, Shard) and p.dim != 0)
    if param.dim() != 2 or width % (form.block * ways):
        return Reason(f"a parameter of shape {list(param.shape)} sharded along dimension {max(dims)} in {ways} parts "
                      f"does not split between blocks of {form.block}")
    return None


def layout(param: Tensor, kind: Kind) -> Layout:
    """Tiles of this rank's part of a parameter whose states are those of ``kind``."""
    rows, width = _rows(local(param).shape)
    return Layout(rows, width, kind.tile) if _by_rows(param, kind) else Layout(1, rows * width, kind.tile)


def _by_rows(param: Tensor, kind: Kind) -> bool:
    """Whether tiles end with each row: for the sake of blocks, and of random bits that do not depend on sharding."""
    if any(f.block for f in kind.formats):
        return True
    return kind.stochastic and param.dim() > 1 and _rows(param.shape)[1] >= kind.tile // 2


def scale_placed(param: Tensor, form: StateFormat, tiles: Layout, part: Tensor) -> Tensor:
    """A state's scales as a tensor sharded like the parameter, where they belong to blocks."""
    if form.per_tensor or not isinstance(param, DTensor):
        return part
    rows, width = _rows(param.shape)
    return like(param, part, (rows, -(-width // tiles.tile), *part.shape[2:]))


def first_group(param: Tensor, kind: Kind) -> int:
    """First group of random bits of this rank's part: where it starts in the whole parameter, if sharded by rows.

    So a parameter takes the same bits however its rows are sharded, if a shard starts at a multiple of eight elements.
    Other shardings take bits of their own on each rank.
    """
    dims = shard_dims(param)
    if not dims or not isinstance(param, DTensor):
        return 0
    mesh = param.device_mesh
    coordinate = mesh.get_coordinate() or [0] * mesh.ndim
    ways = [(i, p.dim) for i, p in enumerate(param.placements) if isinstance(p, Shard)]
    if ways[0][1] == 0 and len(ways) == 1:
        at = ways[0][0]
        row = min(coordinate[at] * -(-param.shape[0] // mesh.size(at)), param.shape[0])
        width = _rows(param.shape)[1]
        if _by_rows(param, kind):
            width = -(-width // kind.tile) * kind.tile
        return -(-row * width // WEIGHT_GROUP)
    rank = 0
    for i, _ in ways:
        rank = rank * mesh.size(i) + coordinate[i]
    return rank << 32


def _rows(shape: torch.Size) -> tuple[int, int]:
    if len(shape) == 0:
        return 1, 1
    return shape[0], math.prod(shape[1:])
