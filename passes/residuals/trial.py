"""What a joint graph would leave for backward if it were divided: the partitioner is asked with a copy."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

from quartet.lowering.ir.graph import is_backward, outputs
from quartet.passes.compilation import Compilation
from quartet.passes.find.find_matmuls import input_indices
from quartet.passes.residuals.boundary import Storage, pairs, storages, stored_bytes


@dataclass(frozen=True)
class Division:
    """A graph in two, and how many of forward's results are the user's."""

    forward: GraphModule
    backward: GraphModule
    outputs: int

    def storages(self) -> list[Storage]:
        """What is kept and is no input."""
        found = storages(pairs(self.forward, self.backward, self.outputs))
        return [storage for storage in found if storage.root.op != "placeholder"]

    def kept_bytes(self) -> int:
        """What :meth:`storages` take."""
        return sum(map(stored_bytes, self.storages()))


def copy_of(gm: GraphModule, again: Collection[Node] = ()) -> GraphModule:
    """A copy of ``gm``, in which backward computes the nodes ``again`` once more."""
    graph, copies = Graph(), dict[Node, Node]()
    output = graph.output(graph.graph_copy(gm.graph, copies))
    output.meta.update(gm.graph.output_node().meta)
    for node in again:
        copies[node].meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
    return GraphModule(gm, graph)


def divide(copied: GraphModule, config: Compilation) -> Division:
    """Divide a copy, which is used up."""
    primals = [node for node in copied.graph.find_nodes(op="placeholder") if not is_backward(node)]
    index = input_indices(copied.graph)
    kept = _of_forward(copied.graph, len(primals))
    assert config.partition is not None
    forward, backward = config.partition(
        copied, (), compiler="inductor", num_fwd_outputs=kept,
        static_lifetime_input_indices=[i for i, node in enumerate(primals) if index.get(node) in config.weights])
    return Division(forward, backward, kept)


def _of_forward(graph: Graph, inputs: int) -> int:
    """How many results are no gradients, not even missing ones. A tensor subclass, of several inputs, may have one."""
    described = graph.output_node().meta.get("desc")
    if described is None:
        return len(outputs(graph)) - inputs
    return sum(desc is not None and not _is_gradient(desc) for desc in described)


def _is_gradient(desc: Any) -> bool:
    while desc is not None and not hasattr(desc, "grad_of"):
        desc = getattr(desc, "base", None)
    return desc is not None
