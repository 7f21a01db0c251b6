"""Scales of all weights of a graph at once: one reduction over a list of tensors, not two launches each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from quartet.kernels.reference.formats.scales import APART
from quartet.lowering.ir.graph import FORWARD, Builder, aten, is_backward, source, val
from quartet.lowering.ir.ops.fp8 import AMAX_OF_EACH, AMAX_OF_WEIGHTS, SCALE
from quartet.lowering.ir.views import Quantize
from quartet.lowering.targets.chains import REUSABLE
from quartet.runtime.view_ops import ORDERS, SAME


@dataclass(frozen=True)
class Scales:
    """What a weight is multiplied by and what its codes are, fp32 ``[1, 1]``.

    ``table``: the multipliers of all weights, fp32 ``[weights, APART, 1]``; ``row``: of this one.
    """

    multiplier: Node
    scale: Node
    table: Node
    row: int


def scales_of_weights(graph: Graph, quantizers: list[Node]) -> dict[Node, Scales]:
    """Multiplier and scale for the quantisers of forward whose X is an input of the graph, with one
    scale a tensor: the weights, and the model's own X where a layer reads it.

    The largest magnitudes of parameters are found once an optimizer step, while gradients accumulate.
    They stand before the first of them and in no region of the user's checkpointing: they are a few bytes.
    """
    groups: dict[Any, list[tuple[Node, Node]]] = {}
    for node in quantizers:
        made = Quantize.of(node)
        weight = _parameter(made.x)
        if weight is not None and made.amax is None and made.spec.block == "tensor" and made.spec.rule != "absmean":
            key = REUSABLE in node.meta, str(made.spec), val(weight).device, val(weight).dtype
            groups.setdefault(key, []).append((node, weight))
    found: dict[Node, Scales] = {}
    for (lasting, spec, *_), members in groups.items():
        if len(members) < 2:
            continue
        build = Builder(graph, like=members[0][0], before=min(node for node, _ in members), backward=False)
        build.meta = {"partitioner_tag": FORWARD}
        weights = list(dict.fromkeys(weight for _, weight in members))
        together = build(AMAX_OF_WEIGHTS if lasting else AMAX_OF_EACH, weights)
        tables = build(SCALE, build(aten.expand.default, together, [-1, APART, 1]), spec)
        multipliers, scales = build.item(tables, 0), build.item(tables, 1)
        for node, weight in members:
            row = weights.index(weight)
            found[node] = Scales(one_of(build, multipliers, row), one_of(build, scales, row), multipliers, row)
    return found


def one_of(build: Builder, table: Node, row: int) -> Node:
    """fp32 ``[1, 1]`` that lies at a multiple of 16 bytes."""
    return build(aten.slice.Tensor, build(aten.select.int, table, 0, row), 0, 0, 1)


def _parameter(x: Node) -> Node | None:
    """The input of forward that X is, or is another order of; None where it is computed, or of no static size."""
    while x.target in ORDERS | SAME and (shown := source(x)) is not None:
        x = shown
    static = all(isinstance(size, int) for size in val(x).shape) and val(x).numel() > 0
    return x if x.op == "placeholder" and static and not is_backward(x) else None
