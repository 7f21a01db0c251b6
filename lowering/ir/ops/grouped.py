"""The semantic ops of grouped products, pure functions of their arguments like the rest of the IR.

    group_layout(offs, multiple, tokens)    [E] → ends [E], source [padded rows], place [tokens], int32
    gather_rows(x, index)                   [R, C] → [len(index), C], zeros where the index is −1
    pad_groups(x, source)                   the same, for what is quantised
    clear_rows(x, source)                   [padded rows, C], zeros in the rows of no token
    quantize_groups(x, spec, ends)          [R, padded rows] → codes, scales [R, E], no mask
    grouped_mm(a, b, ends, over_tokens)     [rows, K] · [E·N, K]ᵀ → [rows, N], or over the tokens of each group
                                            [M, rows] · [N, rows]ᵀ → [E·M, N]
    scaled_grouped_mm(a, a_scales, b, b_scales, a_spec, b_spec, dtype, ends, over_tokens, a_amax, b_amax)

``quartet.kernels.reference.products.grouped`` says what they compute. Inductor inlines the gathers and calls the
others. Results of ``pad_groups`` are kept in memory: quantisers read them several times, and a reduction over what is
being gathered takes almost four times as long (335 µs against 89 of 67 M elements on an H200).
"""

from __future__ import annotations

import torch
from torch import Tensor

from quartet.kernels.reference.products import grouped
from quartet.kernels.spec import QuantSpec
from quartet.lowering import ir
from quartet.lowering.ir import Three
from quartet.lowering.ir.op import Size, op

TOKENS = 16  # of a group that is contracted, a multiple: aten's grouped products want it to begin at whole 16 bytes


def _group_layout_fake(offs, multiple, tokens):
    rows = grouped.padded_rows(tokens, offs.shape[0], multiple)
    return tuple(offs.new_empty(n, dtype=torch.int32) for n in (offs.shape[0], rows, tokens))


@op(fake=_group_layout_fake, strides="any", mergeable=True)
def group_layout(offs: Tensor, multiple: int, tokens: Size) -> Three:
    return grouped.group_layout(offs, multiple, tokens)


def _gather_rows_fake(x, index):
    return x.new_empty(index.shape[0], x.shape[1])


@op(fake=_gather_rows_fake, decompose=True, strides="any", mergeable=True)
def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    return grouped.gather_rows(x, index)


def _pad_groups_inlined(x: Tensor, source: Tensor) -> Tensor:
    return ir.store(grouped.gather_rows(x, source))


@op(fake=_gather_rows_fake, decompose=_pad_groups_inlined, strides="any", mergeable=True)
def pad_groups(x: Tensor, source: Tensor) -> Tensor:
    return grouped.gather_rows(x, source)


@op(fake=lambda x, source: torch.empty_like(x), decompose=True, strides="any", mergeable=True)
def clear_rows(x: Tensor, source: Tensor) -> Tensor:
    return grouped.clear_rows(x, source)


def _quantize_groups_fake(x, spec, ends):
    q = QuantSpec.parse(spec)
    dtype, width = ir.code_layout(q, ir.ceil_to(x.shape[1], q.multiple))
    return (x.new_empty(x.shape[0], width, dtype=dtype), x.new_empty(x.shape[0], ends.shape[0], dtype=torch.float32),
            x.new_empty(0, dtype=torch.uint8))


@op(fake=_quantize_groups_fake, strides="any", mergeable=True)
def quantize_groups(x: Tensor, spec: str, ends: Tensor) -> Three:
    return *grouped.quantize_groups(x, QuantSpec.parse(spec), ends), x.new_empty(0, dtype=torch.uint8)


def _grouped_mm_fake(a, b, ends, over_tokens):
    groups = ends.shape[0]
    return a.new_empty((groups * a.shape[0], b.shape[0]) if over_tokens else (a.shape[0], b.shape[0] // groups))


@op(fake=_grouped_mm_fake, strides="any", mergeable=True, cudagraph_safe=False)  # it asks the host
def grouped_mm(a: Tensor, b: Tensor, ends: Tensor, over_tokens: bool) -> Tensor:
    return grouped.grouped_mm(a, b, ends, over_tokens)


def _scaled_grouped_mm_fake(a, a_scales, b, b_scales, a_spec, b_spec, dtype, ends, over_tokens, a_amax=None,
                            b_amax=None):
    return _grouped_mm_fake(a, b, ends, over_tokens).to(dtype)


@op(fake=_scaled_grouped_mm_fake, strides="any", mergeable=True, cudagraph_safe=False)
def scaled_grouped_mm(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, a_spec: str, b_spec: str,
                      dtype: torch.dtype, ends: Tensor, over_tokens: bool, a_amax: Tensor | None = None,
                      b_amax: Tensor | None = None) -> Tensor:
    return grouped.scaled_grouped_mm(a, a_scales, b, b_scales, QuantSpec.parse(a_spec), QuantSpec.parse(b_spec), dtype,
                                     ends, over_tokens, a_amax, b_amax)


ENDS, SOURCE, PLACE = range(3)  # results of GROUP_LAYOUT
GROUP_LAYOUT, GATHER_ROWS, PAD_GROUPS = group_layout.overload, gather_rows.overload, pad_groups.overload
CLEAR_ROWS = clear_rows.overload
QUANTIZE_GROUPS, GROUPED_MM = quantize_groups.overload, grouped_mm.overload
SCALED_GROUPED_MM = scaled_grouped_mm.overload
