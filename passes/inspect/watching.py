"""Putting an op that looks at tensors into a graph: where it stands, and what is looked at by which name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch.fx import Node

from quartet.lowering.ir.graph import BACKWARD, Builder, is_backward
from quartet.passes.find.find_matmuls import input_indices
from quartet.passes.quantize.delayed import MUST_BE_IN_FORWARD
from quartet.passes.state import State

ACTIVATIONS = ("attention_qk", "attention_pv", "bmm")  # op classes of products that a module has several of


def token_of(state: State) -> Node | None:
    """The input by which an op finds its call; None in a graph that has none, the body of a region."""
    wanted = state.config.token
    indices = input_indices(state.gm.graph) if wanted is not None else {}
    return next((node for node, at in indices.items() if at == wanted), None)


def layers_of(state: State) -> dict[int, str]:
    """Site index → what it is called where its numbers are shown: the module, of a product of activations its op class
    too, and a number where the graph has several of that name, as of a module that is called twice."""
    named: dict[int, str] = {}
    seen = Counter[str]()
    for site in state.sites:
        own = site.op_class if site.op_class in ACTIVATIONS else ""
        name = " ".join(filter(None, (site.fqn, own))) if site.fqn else f"{site.op_class} {site.index}"
        seen[name] += 1
        named[site.index] = name if seen[name] == 1 else f"{name} ({seen[name]})"
    return named


@dataclass
class Tensors:
    """The nodes that one op reads, each once."""

    nodes: list[Node] = field(default_factory=list)

    def at(self, node: Node) -> int:
        """Its position."""
        if node not in self.nodes:
            self.nodes.append(node)
        return self.nodes.index(node)

    def maybe(self, node: Node | None) -> int | None:
        return None if node is None else self.at(node)


def after(state: State, nodes: Iterable[Node]) -> Builder:
    """Inserts what reads these nodes where the last of them is there, in its direction, and never twice."""
    nodes = list(nodes)
    last, backward = max(nodes), any(map(is_backward, nodes))
    while (following := last.next).op == "placeholder":
        last = following
    build = Builder(state.gm.graph, like=last, before=following, backward=backward)
    build.meta = {"partitioner_tag": BACKWARD if backward else MUST_BE_IN_FORWARD}
    return build
