"""Putting an op that looks at tensors into a graph: where it stands, and what is looked at by which name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch.fx import Node

from quartet.lowering.ir.graph import BACKWARD, Builder, is_backward
from quartet.lowering.ir.operands import ROWS, SCALED, Product, quantizer_of
from quartet.lowering.ir.views import Hadamard
from quartet.passes.find.find_matmuls import input_indices
from quartet.passes.matrices import Operand
from quartet.passes.quantize.delayed import MUST_BE_IN_FORWARD
from quartet.passes.sites import SITE_KEY, Found
from quartet.passes.state import State


def token_of(state: State) -> Node | None:
    """The input by which an op finds its call; None in a graph that has none, the body of a region."""
    wanted = state.config.token
    indices = input_indices(state.gm.graph) if wanted is not None else {}
    return next((node for node, at in indices.items() if at == wanted), None)


def layer_of(site: Found) -> str:
    """What a site is called where its numbers are shown."""
    return site.fqn or f"{site.op_class} {site.index}"


class Originals:
    """X, W and E of the sites as tensors of the graph as it is now."""

    def __init__(self, state: State) -> None:
        self._state, self._standing = state, set(state.gm.graph.nodes)
        self._products = {node.meta[SITE_KEY]: node for node in state.gm.graph.nodes
                          if node.target in SCALED and SITE_KEY in node.meta}

    def now(self, node: Node) -> Node | None:
        """What stands for a node, None where nothing reads it any more."""
        found = self._state.current(node)
        return found if found in self._standing else None

    def of(self, site: Found, letter: str) -> Operand | None:
        """``"x"`` ``[tokens, in]``, ``"w"`` ``[out, in]`` or ``"e"`` ``[tokens, out]`` of a site with one matrix, and
        whether it lies transposed; None where the graph has it only in a form that something has been done to."""
        gradients = [gradient.e for gradient in site.gradients.values()]
        given = {"x": site.x, "w": site.w, "e": gradients[0] if gradients else None}[letter]
        if given is None:
            return None
        node = self.now(given[0])
        return self._quantised(site, letter) if node is None else (node, given[1])

    def _quantised(self, site: Found, letter: str) -> Operand | None:
        """What the quantiser of an operand reads, where the views of the model have gone."""
        role, side = {"x": ("fprop", "a"), "w": ("fprop", "b"), "e": ("dgrad", "a")}[letter]
        product = self._products.get((site.index, role))
        found = None if product is None else quantizer_of(getattr(Product.of(product), side).codes)
        if found is None:
            return None
        rotated = Hadamard.into(found.view.x)
        return (found.view.x if rotated is None else rotated.x), found.layout != ROWS


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
