"""Give every matmul that has one matrix to multiply the form ``mm``: a bmm of batch 1 is a matrix product."""

from __future__ import annotations

from torch.fx import Node

from quartet.lowering.graph import Builder, aten, editing, is_backward, keep_as, shape
from quartet.passes.state import State


def canonicalize(state: State) -> None:
    """bmm with a static batch of 1 → view, mm, view. Exact: no arithmetic changes."""
    with editing(state.gm) as graph:
        for node in list(graph.find_nodes(op="call_function", target=aten.bmm.default)):
            batch = shape(node)[0]
            if isinstance(batch, int) and batch == 1:
                _to_mm(state, node)


def _to_mm(state: State, node: Node) -> None:
    build = Builder(state.gm.graph, like=node, before=node, backward=is_backward(node))
    if is_backward(node):  # keep autograd's own freedom to move it
        build.meta["partitioner_tag"] = node.meta["partitioner_tag"]
    a, b = node.args[0], node.args[1]
    assert isinstance(a, Node) and isinstance(b, Node)
    mm = keep_as(build(aten.mm.default, build(aten.squeeze.dim, a, 0), build(aten.squeeze.dim, b, 0)), node)
    node.replace_all_uses_with(build(aten.unsqueeze.default, mm, 0))
