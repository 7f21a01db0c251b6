"""Products of groups: tokens in consecutive groups, each with a matrix of its own (mixture-of-experts layers).

Scales, rotations and the tokens that wgrad contracts must not cross from one group into the next. So every group is
given room for a multiple of the tokens that the recipe needs, zeros behind its own:

    offs [E]      where each group ends among the tokens, as ``torch._grouped_mm`` takes it
    ends [E]      where its room ends in the padded layout
    source        row of the padded layout → token, or −1
    place         token → row of the padded layout, or −1 for tokens behind the last group
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quartet.kernels.reference.formats import nvfp4
from quartet.kernels.reference.formats.packing import unpack_nibbles
from quartet.kernels.reference.formats.scales import fp32_scale
from quartet.kernels.reference.hadamard import pad_last
from quartet.kernels.reference.quantize import encode_fp32, inner
from quartet.kernels.spec import QuantSpec


def padded_rows(tokens: Any, groups: Any, multiple: int) -> Any:
    """Rows that suffice for ``tokens`` in whatever groups: an upper bound, so that shapes do not depend on data.

    A group of c tokens takes at most c + multiple − 1 rows, and all of them together take a multiple.
    """
    return (tokens + groups * (multiple - 1)) // multiple * multiple


def group_layout(offs: Tensor, multiple: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """``ends [E]``, ``source [padded_rows]`` and ``place [tokens]``, int32, for integer non-decreasing ``offs [E]``."""
    stop = offs.to(torch.int64)
    start = torch.cat((stop.new_zeros(1), stop[:-1]))
    count = stop - start
    room = (count + multiple - 1) // multiple * multiple
    ends = room.cumsum(0)
    first, last = ends - room, stop.shape[0] - 1

    row = torch.arange(padded_rows(tokens, stop.shape[0], multiple), device=offs.device)
    group = torch.searchsorted(ends, row, right=True).clamp(max=last)
    behind = row - first[group]
    source = torch.where(behind < count[group], start[group] + behind, -1)

    token = torch.arange(tokens, device=offs.device)
    group = torch.searchsorted(stop, token, right=True).clamp(max=last)
    place = torch.where(token < stop[-1], first[group] + token - start[group], -1)
    return ends.to(torch.int32), source.to(torch.int32), place.to(torch.int32)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """``x[index]`` of ``[rows, cols]``, zeros where the index is −1, whatever x holds."""
    if isinstance(x.shape[0], int) and x.shape[0] == 0:
        return x.new_zeros(index.shape[0], x.shape[1])
    return clear_rows(x.index_select(0, index.clamp(min=0)), index)


def clear_rows(x: Tensor, index: Tensor) -> Tensor:
    """x with zeros in the rows whose index is −1, whatever they hold."""
    return torch.where((index >= 0).unsqueeze(1), x, torch.zeros((), dtype=x.dtype, device=x.device))


def quantize_groups(x: Tensor, spec: QuantSpec, ends: Tensor) -> tuple[Tensor, Tensor]:
    """``[rows, padded tokens]`` with a scale for the part of a row in each group: what ``"row"`` means within one.

    Args:
        x: any float dtype, zeros behind ``ends[-1]``.
        spec: a quantiser of rows with fp32 scales.
        ends: where each group ends along the last axis.
    Returns:
        codes as of :func:`quartet.kernels.reference.quantize`, and fp32 scales ``[rows, E]``.
    """
    x = pad_last(x, spec.multiple)
    rows, groups = x.shape[0], ends.shape[0]
    of_column = group_of(ends, x.shape[1])
    amax = x.new_zeros(rows, groups).scatter_reduce(1, of_column.expand(rows, -1), x.abs(), "amax")
    multiplier, scales = (part.reshape(rows, groups) for part in fp32_scale(amax.reshape(-1, 1), spec))
    return encode_fp32(x.to(torch.float32) * multiplier[:, of_column], spec), scales


def group_of(ends: Tensor, length: int) -> Tensor:
    """Group of each position; what lies behind the last one counts as its."""
    positions = torch.arange(length, device=ends.device, dtype=ends.dtype)
    return torch.searchsorted(ends, positions, right=True).clamp(max=ends.shape[0] - 1)


def grouped_mm(a: Tensor, b: Tensor, ends: Tensor, over_tokens: bool) -> Tensor:
    """``A · Bᵀ`` in each group, operands of one dtype, in the padded layout.

    Args:
        a: ``[rows, K]``, or ``[M, rows]`` when ``over_tokens``.
        b: ``[E·N, K]``, or ``[N, rows]`` when ``over_tokens``.
        ends: int32 ``[E]``, where each group ends along ``rows``.
        over_tokens: whether the product contracts the tokens of each group.
    Returns:
        ``[rows, N]``, zeros behind the last group; or ``[E·M, N]``, zeros for a group without tokens.
    """
    groups = ends.shape[0]
    if over_tokens:
        left, right, out = a, b.t(), a.new_zeros(groups, a.shape[0], b.shape[0])
    else:
        left, right = a, b.reshape(groups, -1, b.shape[1]).transpose(1, 2)
        out = a.new_zeros(a.shape[0], right.shape[2])
    if _by_aten(left) and _by_aten(right):
        made = torch.nn.functional.grouped_mm(left, right, offs=ends)
        if over_tokens:
            return made.flatten(0, 1)
        routed = torch.arange(a.shape[0], device=a.device) < ends[-1]
        return torch.where(routed.unsqueeze(1), made, out)
    start = 0
    for group, end in enumerate(ends.tolist()):
        if end > start and over_tokens:
            torch.mm(left[:, start:end], right[start:end], out=out[group])
        elif end > start:
            torch.mm(left[start:end], right[group], out=out[start:end])
        start = end
    return out.flatten(0, 1) if over_tokens else out


def _by_aten(x: Tensor) -> bool:
    """Whether ``aten._grouped_mm`` takes the operand on a GPU without asking the host where groups end."""
    if not x.is_cuda or x.dtype != torch.bfloat16:
        return False
    strides = sorted(x.stride()[-2:])
    return x.data_ptr() % 16 == 0 and strides[0] == 1 and strides[1] % 8 == 0


def scaled_grouped_mm(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, a_spec: QuantSpec, b_spec: QuantSpec,
                      dtype: torch.dtype, ends: Tensor, over_tokens: bool, a_amax: Tensor | None = None,
                      b_amax: Tensor | None = None, unpack: Callable[[Tensor], Tensor] = unpack_nibbles) -> Tensor:
    """:func:`grouped_mm` of two quantised tensors, in the arithmetic of
    :func:`quartet.kernels.reference.quantize.scaled_mm` in each group.

    The scales of rows are ``[rows, 1]`` and ``[E·N, 1]``; when ``over_tokens``, one a group: ``[M, E]`` and ``[N, E]``.
    The scale of a tensor is that of all groups.
    """
    exact = a_spec.exact_in_bf16 and b_spec.exact_in_bf16
    compute = torch.bfloat16 if dtype == torch.bfloat16 and exact else torch.float32
    left, right = (inner(c, s, s_, compute, unpack) for c, s, s_ in ((a, a_scales, a_spec), (b, b_scales, b_spec)))
    product = grouped_mm(left, right, ends, over_tokens)
    gain = a_spec.gain * b_spec.gain
    product = product * gain if gain != 1.0 else product
    groups = ends.shape[0]
    if a_spec.block == "row":
        product = product * (a_scales.t().reshape(-1, 1) if over_tokens else a_scales)
    elif a_spec.block == "tensor":
        product = product * a_scales
    if b_spec.block == "row":
        if over_tokens:
            product = (product.reshape(groups, -1, product.shape[1]) * b_scales.t().unsqueeze(1)).flatten(0, 1)
        else:
            product = product * b_scales.reshape(groups, -1)[group_of(ends, product.shape[0])]
    elif b_spec.block == "tensor":
        product = product * b_scales
    for spec, amax in ((a_spec, a_amax), (b_spec, b_amax)):
        if spec.scale == "e4m3":
            assert amax is not None
            product = product.to(torch.float32) * nvfp4.tensor_scales(amax, spec)[1]
    return product.to(dtype)
