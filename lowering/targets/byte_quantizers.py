"""Quantisers to codes of one byte that are left to Inductor, to kernels of their own where those run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Graph, Node

from quartet.lowering import ir
from quartet.lowering.ir.graph import Builder, hand_over, is_backward, results, val
from quartet.lowering.ir.op import Op
from quartet.lowering.ir.operands import readers
from quartet.lowering.ir.ops import fused
from quartet.lowering.ir.views import Quantize
from quartet.lowering.targets.chains import Source, both_axes

Runs = Callable[[Op, torch.device], bool]


def take(graph: Graph, runs: Runs) -> None:
    """Rewrite the quantise nodes whose format a kernel writes, those of a tensor's two axes in one direction to one.

    Args:
        runs: whether a kernel of an op runs on a device.
    """
    found = [node for node in graph.find_nodes(op="call_function", target=ir.QUANTIZE)
             if runs(fused.cuda_quantize_bytes, val(Quantize.of(node).x).device) and _written(node)]
    blocks = [node for node in found if Quantize.of(node).spec.blocked
              and runs(fused.cuda_quantize_bytes_both, val(Quantize.of(node).x).device)]
    pairs = both_axes(blocks)
    for rows, columns in pairs:
        first = min(rows, columns)
        build = Builder(graph, like=first, before=first, backward=is_backward(first))
        specs = (str(Quantize.of(node).spec) for node in (rows, columns))
        both = build(fused.QUANTIZE_BYTES_BOTH, Quantize.of(rows).x, *specs)
        for at, node in ((0, rows), (2, columns)):
            hand_over(node, [build.item(both, at), build.item(both, at + 1)])
    paired = {node for pair in pairs for node in pair}
    for node in found:
        if node not in paired:
            build, made = Builder(graph, like=node, before=node, backward=is_backward(node)), Quantize.of(node)
            alone = build(fused.QUANTIZE_BYTES, made.x, str(made.spec))
            hand_over(node, [build.item(alone, 0), build.item(alone, 1)])


def _written(node: Node) -> bool:
    """Whether a kernel writes all that is read of a quantiser, without a copy before it: rows lie in memory. What
    products read that are left to Inductor it dequantises in the same kernel."""
    from quartet.kernels.triton.bytes import rows, tiles

    made = Quantize.of(node)
    supports = tiles.supports if made.spec.blocked else rows.supports
    return (supports(made.spec, val(made.x).dtype) is None and results(node).keys() <= {0, 1}
            and (made.spec.blocked or Source.of(node).transposed is None) and not readers(node))
