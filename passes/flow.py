"""Where the values of a forward graph come from and where they go: which a layer has made, which a layer reads.

A layer contracts data with a weight of two or more dimensions. Only floating-point values carry on: what a layer's
scores choose by comparison or argmax is no longer its output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any

import torch
from torch.fx import Graph, Node

from quartet.lowering.ir.graph import is_backward, shape
from quartet.passes.matrices import MATMULS, operands

_CONTRACTIONS = ("aten.convolution", "aten._convolution", "aten.embedding.", "aten._embedding_bag", "aten.mkldnn_rnn",
                 "aten._cudnn_rnn", "aten.miopen_rnn", "aten.lstm", "aten.gru", "aten._trilinear", "invoke_subgraph")


@dataclass(frozen=True)
class Flow:
    """Facts about the forward nodes of one graph.

    Attributes:
        origin: nodes computed from parameters alone → name of the parameter.
        order: position of each node.
        layers: nodes that contract data with a weight → name of its parameter.
        made: nodes that depend on the result of a layer.
        read: nodes whose values reach a layer as its data.
        leaves: nodes whose values reach what the graph returns.
        widths: input features of the layers that are matrix products. written: output features of all layers.
    """

    origin: Mapping[Node, str] = field(default_factory=dict)
    order: Mapping[Node, int] = field(default_factory=dict)
    layers: Mapping[Node, str] = field(default_factory=dict)
    made: frozenset[Node] = frozenset()
    read: frozenset[Node] = frozenset()
    leaves: frozenset[Node] = frozenset()
    widths: frozenset[int] = frozenset()
    written: frozenset[int] = frozenset()

    @classmethod
    def of(cls, graph: Graph, origin: Mapping[Node, str]) -> Flow:
        """The facts of a joint or inference graph; what runs in backward is left out."""
        nodes = [node for node in graph.nodes if node.op == "output" or not is_backward(node)]
        layers = {node: name for node in nodes if (name := _weight_name(node, origin)) is not None}
        made: set[Node] = set()
        for node in nodes:
            if node in layers or any(i in made for i in node.all_input_nodes) and not _is_size(node):
                made.add(node)
        read: set[Node] = set()
        leaves: set[Node] = set()
        for node in reversed(nodes):
            if node.op == "output" or not holds_floats(node):
                continue
            for user in node.users:
                if user.op == "output":
                    leaves.add(node)
                elif not is_backward(user):
                    if user in read or (user in layers and node not in origin):
                        read.add(node)
                    if user in leaves:
                        leaves.add(node)
        order = {node: position for position, node in enumerate(nodes)}
        widths = {width for node in layers if isinstance(width := contracted(node), int)}
        written = {width for node in layers if isinstance(width := _written(node, origin), int)}
        return cls(origin, order, layers, frozenset(made), frozenset(read), frozenset(leaves), frozenset(widths),
                   frozenset(written))

    def own(self, node: Node) -> dict[Node, None]:
        """The forward nodes that are computed from ``node`` and from nothing else that a layer has made, in order."""
        found: dict[Node, None] = {node: None}
        waiting = sorted((self.order[user], user) for user in node.users if user in self.order)
        while waiting:
            _, at = heappop(waiting)
            if at.op == "call_function" and at not in found and at not in self.layers and all(
                    i in found or i not in self.made for i in at.all_input_nodes):
                found[at] = None
                for user in at.users:
                    if user in self.order:
                        heappush(waiting, (self.order[user], user))
        return found


def contracted(node: Node) -> Any:
    """The size of the axis that a matrix product contracts; None of anything else."""
    return shape(operands(node)[0])[-1] if node.target in MATMULS else None


def holds_floats(node: Node) -> bool:
    """Whether a node's value is a floating-point tensor, or several values of which one is."""
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else (value,)
    return any(isinstance(v, torch.Tensor) and v.is_floating_point() for v in values)


def _is_size(node: Node) -> bool:
    """Whether a node is a symbolic size, which says nothing of the values of what has it."""
    return isinstance(node.meta.get("val"), torch.SymInt)


def _weight_name(node: Node, origin: Mapping[Node, str]) -> str | None:
    """The parameter that a node contracts data with, or None."""
    name = str(node.target)
    if node.op != "call_function" or node in origin:
        return None
    if node.target not in MATMULS and "grouped_mm" not in name and not name.startswith(_CONTRACTIONS):
        return None
    return next((origin[i] for i in node.all_input_nodes if i in origin and _rank(i) >= 2), None)


def _written(node: Node, origin: Mapping[Node, str]) -> Any:
    """The features that a layer makes: of a convolution its channels, of an embedding the columns of its table."""
    if node.target in MATMULS:
        return shape(node)[-2 if operands(node)[0] in origin else -1]
    weight = next(i for i in node.all_input_nodes if i in origin and _rank(i) >= 2)
    return shape(weight)[-1 if "embedding" in str(node.target) else 0]


def _rank(node: Node) -> Any:
    return len(shape(node)) if isinstance(node.meta.get("val"), torch.Tensor) else 0
