"""Let autograd notice that a weight was written to between forward and backward.

    gX = E · W

Where autograd's dgrad reads a parameter, or a view of one, PyTorch keeps the parameter and raises in backward if its
version counter has moved. Ours reads codes that forward made, and would go on with the old weight. So backward takes
the parameter as well, for an assertion about nothing: it costs no memory, and Inductor drops it. What autograd reads
through a cast is a tensor of its own, which a later write to the parameter does not change.
"""

from __future__ import annotations

from torch.fx import Node

from quartet.lowering.ir.graph import Builder, aten, editing
from quartet.passes.find.find_matmuls import input_indices
from quartet.passes.graph_pass import graph_pass
from quartet.passes.residuals.boundary import above_view
from quartet.passes.sites import Planned
from quartet.passes.state import State


@graph_pass(reads=Planned, optional=True,
            summary="a weight that is written to between forward and backward is an error there, as without us")
def unchanged(state: State) -> None:
    """Tie each parameter that a planned dgrad reads to backward."""
    index = input_indices(state.gm.graph)
    tied: set[Node] = set()
    with editing(state.gm) as graph:
        for site in state.at(Planned):
            weight = _viewed(site.w[0])
            if not site.active("dgrad") or weight in tied or index.get(weight) not in state.config.weights:
                continue
            tied.add(weight)
            product = site.gradients["dgrad"].node
            Builder(graph, like=product, before=product, backward=True)(aten._assert_tensor_metadata.default, weight)


def _viewed(node: Node) -> Node:
    """What a node is a view of."""
    above = above_view(node)
    return node if above is None else _viewed(above)
