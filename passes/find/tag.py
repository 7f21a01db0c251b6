"""Say of every node whether it runs in forward or in backward, where autograd has not.

What the backward of a custom ``autograd.Function`` computes carries no tag. Forward is tagged as a whole when it has
been traced, so in a graph with tags a node without one is backward's, unless a forward node reads it.
"""

from __future__ import annotations

from torch.fx import Node

from quartet.lowering.ir.graph import BY_HAND, FORWARD, is_backward
from quartet.passes.graph_pass import graph_pass
from quartet.passes.state import State

TAG = "partitioner_tag"
_AUTOGRAD = "is_backward"


@graph_pass(summary="what runs in backward, where a custom Function has computed it")
def tag(state: State) -> None:
    """Tag every operator of a graph that has a backward."""
    nodes = [node for node in state.gm.graph.nodes if node.op == "call_function"]
    if not any(is_backward(node) for node in state.gm.graph.nodes):
        return
    traced = any(node.meta.get(TAG) == FORWARD for node in nodes)
    untagged = [node for node in nodes if TAG not in node.meta]
    for node in untagged:
        if any(is_backward(source) for source in node.all_input_nodes):
            _by_hand(node)
    for node in reversed(untagged):
        if TAG not in node.meta and traced and not any(_is_forward(user) for user in node.users):
            _by_hand(node)
        node.meta.setdefault(TAG, FORWARD)


def _by_hand(node: Node) -> None:
    node.meta |= {TAG: _AUTOGRAD, BY_HAND: True}


def _is_forward(node: Node) -> bool:
    return node.op == "call_function" and not is_backward(node)
