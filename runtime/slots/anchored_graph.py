"""Graphs with one more input, the anchor by which what is remembered of their weights is found
(``quartet.runtime.slots.amax``)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule

from quartet.runtime.compat import detect_fake_mode
from quartet.runtime.slots.amax import Anchor
from quartet.runtime.slots.steps import STEPS


class Anchored:
    """A compiled graph whose last input is an anchor, found anew for each call's weights."""

    def __init__(self, compiled: Callable[..., Any], weights: Sequence[int]) -> None:
        self.compiled, self.indices = compiled, tuple(weights)
        self._anchors: dict[int, Anchor] = {}
        STEPS.watch()

    def __call__(self, *args: Any) -> Any:
        STEPS.after_compiled_steps()
        return self.compiled(*args, self._find(args).tensor)

    def _find(self, args: Sequence[Any]) -> Anchor:
        weights = {index: args[index] for index in self.indices}
        key = id(weights[self.indices[0]])
        found = self._anchors.get(key)
        if found is None or not found.stands_for(weights):
            self._anchors = {k: anchor for k, anchor in self._anchors.items() if anchor.alive}
            found = self._anchors[key] = Anchor(weights)
        return found


def with_input(gm: GraphModule, example_inputs: Sequence[Any], tensor: torch.Tensor,
               name: str = "quartet_anchor") -> tuple[GraphModule, list[Any]]:
    """A copy of ``gm`` with an unused input ``name`` for ``tensor`` after its own, and its example inputs."""
    graph = Graph(tracer_cls=getattr(gm.graph, "_tracer_cls", None))
    copied: dict[Any, Any] = {}
    inputs = gm.graph.find_nodes(op="placeholder")
    for node in inputs:
        copied[node] = graph.node_copy(node)
    added = graph.placeholder(name)
    added.meta["example_value"] = _like_an_input(gm, tensor)
    added._dynamo_source = None  # as an intermediate value that DDP makes an input
    graph.output(graph.graph_copy(gm.graph, copied))
    graph.output_node().meta = copy.copy(gm.graph.output_node().meta)
    for node, twin in copied.items():
        if hasattr(node, "_dynamo_source"):
            twin._dynamo_source = node._dynamo_source
    made = GraphModule(gm, graph, type(gm).__name__)
    made.meta = {**gm.meta}
    for name, value in vars(gm).items():
        if name not in vars(made):
            setattr(made, name, value)
    return made, [*example_inputs, tensor]


def forget_examples(gm: GraphModule) -> None:
    """Drop the weak references to example inputs from a copy that has been compiled, as dynamo does from its own graph:
    ``torch.utils.swap_tensors`` refuses what is referred to."""
    for node in gm.graph.find_nodes(op="placeholder"):
        node.meta.pop("grapharg", None)


def _like_an_input(gm: GraphModule, tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` under the fake mode of the graph, where it has one."""
    mode = detect_fake_mode([n.meta.get("example_value") for n in gm.graph.find_nodes(op="placeholder")])
    return tensor if mode is None else mode.from_tensor(tensor, static_shapes=True)
