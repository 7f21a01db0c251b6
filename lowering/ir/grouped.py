"""The semantic ops of grouped products, pure functions of their arguments like the rest of the IR.

    group_layout(offs, multiple, tokens)    [E] → ends [E], source [padded rows], place [tokens], int32
    gather_rows(x, index)                   [R, C] → [len(index), C], zeros where the index is −1
    pad_groups(x, source)                   the same, for what is quantised
    quantize_groups(x, spec, ends)          [R, padded rows] → codes, scales [R, E], no mask
    grouped_mm(a, b, ends, over_tokens)     [rows, K] · [E·N, K]ᵀ → [rows, N], or over the tokens of each group
                                            [M, rows] · [N, rows]ᵀ → [E·M, N]
    scaled_grouped_mm(a, a_scales, b, b_scales, a_spec, b_spec, dtype, ends, over_tokens, a_amax, b_amax)

``quartet.kernels.reference.products.grouped`` says what they compute. Inductor inlines the gathers and calls the
others. Results of ``pad_groups`` are kept in memory: quantisers read them several times, and a reduction over what is
being gathered takes almost four times as long (335 µs against 89 of 67 M elements on an H200).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quartet.kernels.reference.products import grouped
from quartet.kernels.spec import QuantSpec
from quartet.lowering import ir

_ANY_STRIDES = (torch.Tag.flexible_layout,)
_ASKS_THE_HOST = (torch.Tag.flexible_layout, torch.Tag.cudagraph_unsafe)

ir.library.define("group_layout(Tensor offs, int multiple, SymInt tokens) -> (Tensor, Tensor, Tensor)",
                  tags=_ANY_STRIDES)
ir.library.define("gather_rows(Tensor x, Tensor index) -> Tensor", tags=_ANY_STRIDES)
ir.library.define("pad_groups(Tensor x, Tensor source) -> Tensor", tags=_ANY_STRIDES)
ir.library.define("quantize_groups(Tensor x, str spec, Tensor ends) -> (Tensor, Tensor, Tensor)", tags=_ANY_STRIDES)
ir.library.define("grouped_mm(Tensor a, Tensor b, Tensor ends, bool over_tokens) -> Tensor", tags=_ASKS_THE_HOST)
ir.library.define("scaled_grouped_mm(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, str a_spec, str b_spec, "
                  "ScalarType dtype, Tensor ends, bool over_tokens, Tensor? a_amax=None, Tensor? b_amax=None) "
                  "-> Tensor", tags=_ASKS_THE_HOST)


def _group_layout_fake(offs: Tensor, multiple: int, tokens: Any) -> ir.Three:
    rows = grouped.padded_rows(tokens, offs.shape[0], multiple)
    return tuple(offs.new_empty(n, dtype=torch.int32) for n in (offs.shape[0], rows, tokens))  # type: ignore[return-value]


def _gather_rows_fake(x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty(index.shape[0], x.shape[1])


def _pad_groups_inlined(x: Tensor, source: Tensor) -> Tensor:
    return torch.ops.quartet.store(grouped.gather_rows(x, source))


def _quantize_groups(x: Tensor, spec: str, ends: Tensor) -> ir.Three:
    return *grouped.quantize_groups(x, QuantSpec.parse(spec), ends), x.new_empty(0, dtype=torch.uint8)


def _quantize_groups_fake(x: Tensor, spec: str, ends: Tensor) -> ir.Three:
    q = QuantSpec.parse(spec)
    dtype, width = ir.code_layout(q, ir.ceil_to(x.shape[1], q.multiple))
    return (x.new_empty(x.shape[0], width, dtype=dtype), x.new_empty(x.shape[0], ends.shape[0], dtype=torch.float32),
            x.new_empty(0, dtype=torch.uint8))


def _grouped_mm_fake(a: Tensor, b: Tensor, ends: Tensor, over_tokens: bool) -> Tensor:
    groups = ends.shape[0]
    return a.new_empty((groups * a.shape[0], b.shape[0]) if over_tokens else (a.shape[0], b.shape[0] // groups))


def _scaled_grouped_mm(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, a_spec: str, b_spec: str,
                       dtype: torch.dtype, ends: Tensor, over_tokens: bool, a_amax: Tensor | None = None,
                       b_amax: Tensor | None = None) -> Tensor:
    return grouped.scaled_grouped_mm(a, a_scales, b, b_scales, QuantSpec.parse(a_spec), QuantSpec.parse(b_spec), dtype,
                                     ends, over_tokens, a_amax, b_amax)


def _scaled_grouped_mm_fake(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, a_spec: str, b_spec: str,
                            dtype: torch.dtype, ends: Tensor, over_tokens: bool, a_amax: Tensor | None = None,
                            b_amax: Tensor | None = None) -> Tensor:
    return _grouped_mm_fake(a, b, ends, over_tokens).to(dtype)


for _name, _impl, _fake in (
    ("group_layout", grouped.group_layout, _group_layout_fake),
    ("gather_rows", grouped.gather_rows, _gather_rows_fake),
    ("pad_groups", grouped.gather_rows, _gather_rows_fake),
    ("quantize_groups", _quantize_groups, _quantize_groups_fake),
    ("grouped_mm", grouped.grouped_mm, _grouped_mm_fake),
    ("scaled_grouped_mm", _scaled_grouped_mm, _scaled_grouped_mm_fake),
):
    ir.library.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"quartet::{_name}", _fake, lib=ir.library)

GROUP_LAYOUT = torch.ops.quartet.group_layout.default
GATHER_ROWS = torch.ops.quartet.gather_rows.default
PAD_GROUPS = torch.ops.quartet.pad_groups.default
QUANTIZE_GROUPS = torch.ops.quartet.quantize_groups.default
GROUPED_MM = torch.ops.quartet.grouped_mm.default
SCALED_GROUPED_MM = torch.ops.quartet.scaled_grouped_mm.default
SEMANTIC = (GROUP_LAYOUT, GATHER_ROWS, PAD_GROUPS, QUANTIZE_GROUPS, GROUPED_MM, SCALED_GROUPED_MM)

DECOMPOSITIONS = {GATHER_ROWS: grouped.gather_rows, PAD_GROUPS: _pad_groups_inlined}
