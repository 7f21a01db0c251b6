"""Products between scores and their softmax, or between a softmax and the values: talking heads."""

from __future__ import annotations

from torch.fx import Node

from quartet.lowering.ir.graph import argument, aten, shape
from quartet.passes.matrices import operands
from quartet.runtime.sizes import same
from quartet.runtime.view_ops import COPIES, RESHAPES


def mixed_heads(node: Node) -> Node | None:
    """Of a product that mixes the heads of scores, ``[batch, queries, keys, heads] · [heads, heads]``, the scores as it
    reads them; None of any other node. Each of its results is of one query and one key, as its operands are."""
    if node.target not in (aten.mm.default, aten.addmm.default):
        return None
    scores, weight = operands(node)
    heads, at = shape(weight)[0], scores
    while at.target in RESHAPES | COPIES:
        at = at.all_input_nodes[0]
    if at.target is not aten.permute.default or not same(heads, shape(weight)[1]):
        return None
    order = [axis % len(shape(at)) for axis in argument(at, "dims")]
    moved = len(order) == 4 and order[-1] != 3 and order.index(3) == 2
    return scores if moved and same(shape(at)[-1], heads) else None
