"""Give every product the form in which the other passes look for it, once. Exact: no arithmetic changes.

    a bmm of one matrix each is an mm
    what a custom Function's backward multiplies again is forward's product, as Inductor would find on its own
"""

from __future__ import annotations

from torch.fx import Node

from quartet.lowering.ir.graph import BY_HAND, Builder, aten, editing, is_backward, keep_as, shape
from quartet.passes.find.values import Values
from quartet.passes.graph_pass import graph_pass
from quartet.passes.matrices import MATMULS, operands
from quartet.passes.state import State


@graph_pass(optional=True,
            summary="a bmm of batch 1 is a matrix product; what such a Function multiplies again is one product")
def canonicalize(state: State) -> None:
    """Rewrite batches of one, then merge what is multiplied twice."""
    with editing(state.gm) as graph:
        for node in list(graph.find_nodes(op="call_function", target=aten.bmm.default)):
            batch = shape(node)[0]
            if isinstance(batch, int) and batch == 1:
                _to_mm(state, node)
    again = [n for n in state.gm.graph.nodes if n.target in MATMULS and BY_HAND in n.meta]
    if again:
        _merge(state, again)


def _to_mm(state: State, node: Node) -> None:
    build = Builder(state.gm.graph, like=node, before=node, backward=is_backward(node))
    if is_backward(node):  # keep autograd's own freedom to move it
        build.meta["partitioner_tag"] = node.meta["partitioner_tag"]
    a, b = operands(node)
    mm = keep_as(build(aten.mm.default, build(aten.squeeze.dim, a, 0), build(aten.squeeze.dim, b, 0)), node)
    node.replace_all_uses_with(build(aten.unsqueeze.default, mm, 0))


def _merge(state: State, again: list[Node]) -> None:
    values = Values(state.gm.graph)
    forward = {values[n]: n for n in reversed(state.gm.graph.nodes) if n.target in MATMULS and not is_backward(n)}
    with editing(state.gm):
        for node in again:
            first = forward.get(values[node])
            if first is not None:
                node.replace_all_uses_with(first)
