"""The operators that show, lay out or cast a tensor, in sets from which every rule about them is put together."""

from __future__ import annotations

import operator
from typing import Any

import torch

aten = torch.ops.aten
Ops = frozenset[Any]

CAST = torch.ops.prims.convert_element_type.default
SAME: Ops = frozenset({aten.alias.default, aten.detach.default, aten.lift_fresh.default})
COPIES: Ops = SAME | {aten.clone.default}
RESHAPES: Ops = frozenset({aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.squeeze.dim,
                           aten.unsqueeze.default})
ORDERS: Ops = frozenset({aten.permute.default, aten.t.default, aten.transpose.int})
PARTS: Ops = frozenset({aten.slice.Tensor, aten.select.int})
VIEWS: Ops = RESHAPES | ORDERS | PARTS | {aten.alias.default}
PASSED_ON: Ops = VIEWS | {CAST, operator.getitem}  # one value in, and nothing is computed with it
