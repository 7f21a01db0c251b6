"""Compute each thing once: equal semantic ops, and the views and casts between them, become one node.

q, k and v read one quantised X, gate and up another; what wgrad requantises of that X is shared too,
since the sites of a group draw the same bits for it. Nodes merge only within one direction and one
checkpoint region.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from quartet.lowering.ir.graph import aten, editing, is_backward
from quartet.lowering.ir.op import op_of
from quartet.passes.graph_pass import graph_pass
from quartet.passes.sites import Quantized
from quartet.passes.state import State
from quartet.runtime.view_ops import PASSED_ON

MERGED_VIEWS = PASSED_ON - {aten.reshape.default}  # a reshape may be a copy


@graph_pass(reads=Quantized, optional=True, summary="equal nodes become one")
def share(state: State) -> None:
    """Common subexpressions of the quantised IR."""
    seen: dict[Any, Node] = {}
    with editing(state.gm) as graph:
        for node in graph.nodes:
            if node.op != "call_function" or not _merges(node):
                continue
            key = (node.target, frozen(node.args), frozen(node.kwargs), is_backward(node),
                   str(node.meta.get("recompute")), node.meta.get("ac_graph_id"))
            first = seen.setdefault(key, node)
            if first is not node:
                node.replace_all_uses_with(first)


def _merges(node: Node) -> bool:
    op = op_of(node.target)
    return node.target in MERGED_VIEWS if op is None else op.mergeable


def frozen(value: Any) -> Any:
    """Arguments of a node as a key: equal where they are the same nodes and values."""
    def plain(v: Any) -> Any:
        if isinstance(v, dict):
            return tuple((k, plain(x)) for k, x in v.items())
        if isinstance(v, (list, tuple)):
            return tuple(plain(x) for x in v)
        return v if isinstance(v, (Node, int, float, str, type(None))) else str(v)

    return plain(map_arg(value, _operand))


def _operand(node: Node) -> Any:
    """What stands for a node in a key: sizes that are written alike are one, whatever nodes hold them."""
    size = node.meta.get("val")
    return f"size {size}" if isinstance(size, torch.SymInt) else node
