"""Making, copying and reading the stored tensors of one parameter's states."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from quartet.kernels.reference.optim.optimizers import Kind, next_scale, store, unpacked
from quartet.kernels.reference.optim.state_format import StateFormat
from quartet.kernels.reference.optim.states import Layout, code_dtype, scale_shape, zero_code
from quartet.runtime.optim import layout as place


@dataclass(frozen=True)
class Kept:
    """A tensor that ``Optimizer.load_state_dict`` passes on without casting it to the parameter's dtype."""

    value: Tensor


def made(param: Tensor, tiles: Layout, kind: Kind, at: int, name: str, value: Tensor | None) -> dict[str, Tensor]:
    """The tensors of state ``at``, holding ``value`` (shaped and sharded like the parameter), or zero."""
    form, part = kind.formats[at], place.local(param.detach())
    codes = torch.empty_like(part, dtype=code_dtype(form))
    codes.fill_(zero_code(form, kind.signed[at]))
    shape = scale_shape(form, tiles)
    scale = None if shape is None else torch.zeros(shape, dtype=torch.float32, device=part.device)
    if value is not None and part.numel():
        _fill(param, tiles, kind, at, codes, scale, value)
    found = {name: place.like(param, codes, tuple(param.shape))}
    if scale is not None:
        found[f"{name}_scale"] = place.scale_placed(param, form, tiles, scale)
    return found


def _fill(param: Tensor, tiles: Layout, kind: Kind, at: int, codes: Tensor, scale: Tensor | None,
          value: Tensor) -> None:
    form = kind.formats[at]
    order = place.dense(codes)[1]
    x = place.local(value).to(codes.device, torch.float32).reshape(codes.shape).permute(order)
    if form.per_tensor:
        assert scale is not None
        amax = value.detach().to(torch.float32).abs().max()
        scale[1] = amax.full_tensor() if isinstance(amax, DTensor) else amax
        scale[0] = next_scale(scale, form)
    store(kind, tiles, at, tiles.split(x.contiguous()), codes.permute(order), scale)
    if scale is not None and form.per_tensor and form.scaling == "delayed":
        scale[1] = amax.full_tensor() if isinstance(amax, DTensor) else amax


def decoded(param: Tensor, tiles: Layout, kind: Kind, at: int, codes: Tensor, scale: Tensor | None) -> Tensor:
    """fp32 values of a state, shaped and sharded like the parameter."""
    part = place.local(codes)
    view, order = place.dense(part)
    one = Kind(kind.algorithm, (kind.formats[at],), (kind.signed[at],))
    values = tiles.join(unpacked(one, tiles, [view], [None if scale is None else place.local(scale)])[0])
    out = torch.empty_like(part, dtype=torch.float32)
    out.permute(order).copy_(values.reshape(view.shape))
    return place.like(param, out, tuple(param.shape))


def native(value: Tensor | None, scale: Tensor | None, form: StateFormat, shape: tuple[int, ...] | None) -> bool:
    """Whether a saved state is stored as ``form`` already."""
    if value is None or value.dtype is not code_dtype(form):
        return False
    if shape is None or scale is None:
        return (shape is None) == (scale is None)
    return scale.dtype is torch.float32 and tuple(place.local(scale).shape) == shape


def in_order(param: Tensor, codes: Tensor) -> bool:
    """Whether codes lie in memory as the elements of their parameter do."""
    x, y = place.local(codes), place.local(param)
    return x.stride() == y.stride() or place.dense(x)[1] == place.dense(y.detach())[1]


def in_order_of(param: Tensor, tiles: Layout, kind: Kind, at: int, name: str, codes: Tensor,
                scale: Tensor | None) -> dict[str, Tensor]:
    """The tensors of state ``at`` as they are where they lie in memory as the parameter does.

    Blocks are counted in memory, so that those of another order are encoded anew.
    """
    if kind.formats[at].block is not None:
        return made(param, tiles, kind, at, name, decoded(param, tiles, kind, at, codes, scale))
    part = torch.empty_like(place.local(param.detach()), dtype=codes.dtype).copy_(place.local(codes))
    found = {name: place.like(param, part, tuple(param.shape))}
    return found if scale is None else found | {f"{name}_scale": scale}


def copied(param: Tensor, tiles: Layout, kind: Kind, at: int, name: str, value: Tensor,
           scale: Tensor | None) -> dict[str, Tensor]:
    """Copies of the tensors of a saved state, on the parameter's device and in its order in memory."""
    codes = value.detach().to(param.device, copy=True)
    scales = None if scale is None else scale.detach().to(param.device, copy=True)
    if not in_order(param, value):
        return in_order_of(param, tiles, kind, at, name, codes, scales)
    return {name: codes} if scales is None else {name: codes, f"{name}_scale": scales}
