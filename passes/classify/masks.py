"""Which matrices of a product a mask has thinned out: pairs of tokens of which some must not meet.

A mask is a condition on positions or on inputs of the model: comparisons of what no product and no random number has
computed, such as ``tril``, a causal or a padding mask. It is applied by a selection, by a multiplication with it, or
by a sum before a softmax, and it shows through everything elementwise, so in the decays of a state-space model too.

    scores  S = Q·Kᵀ      Y is masked                     P·V             X is masked
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from quartet.lowering.ir.graph import aten, is_backward, shape, val
from quartet.passes.classify.mixing import mixed_heads

_PRODUCTS = ("aten.mm.", "aten.addmm.", "aten.bmm.", "aten.baddbmm.", "aten.convolution", "aten._grouped_mm",
             "aten._scaled_dot_product_", "quartet.")
_LOOKUPS = ("aten.embedding.", "aten.index.", "aten.gather.", "aten.index_select.")
_COUNTS = ("aten.sum.", "aten.cumsum.")
_WITH_A_SUM = ("aten.addmm.", "aten.baddbmm.")
_TRIANGLES = ("aten.tril.", "aten.triu.")
_UNMIXED = (aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.permute.default, aten.t.default,
            aten.transpose.int, aten.slice.Tensor, aten.select.int, aten.squeeze.dim, aten.unsqueeze.default,
            aten.expand.default, aten.clone.default, aten.alias.default, aten.constant_pad_nd.default, aten.cat.default)
_DEPTH = 24


class Masks:
    """What masks there are in a graph.

    Args:
        parameters: its inputs that are parameters; a bias of scores that is made from them alone is no mask.
    """

    def __init__(self, parameters: set[Node]) -> None:
        self.parameters = parameters
        self._masked: dict[Node, bool] = {}
        self._applied: set[Node] = set()
        self._inputs: dict[Node, set[Node] | None] = {}

    def of_activations(self, product: Node, x: Node, w: Node, op_class: str) -> frozenset[str]:
        """Which of ``"x"``, ``"w"`` and ``"y"`` are masked where two activations are multiplied; products are asked
        about in the order of the graph, as a mask on the results of one shows in the operands of the next."""
        found = {"x": self._is_masked(x), "w": self._is_masked(w),
                 "y": self._becomes_masked(product, op_class == "attention_qk")}
        return frozenset(name for name, masked in found.items() if masked)

    def of_weight(self, w: Node) -> frozenset[str]:
        """``{"w"}`` where a weight is masked by positions, such as a causal mixing of tokens; a mask that is an input,
        as pruning has them, tells nothing about tokens."""
        return frozenset({"w"} if self._is_masked(w, inputs=False) else ())

    def _is_masked(self, node: Node, inputs: bool = True) -> bool:
        """Whether a mask was applied to ``node`` on its way from products, inputs and constants."""
        if inputs and node in self._masked:
            return self._masked[node]
        found, frontier, seen = False, [node], {node}
        while frontier and not found:
            at = frontier.pop()
            found = at in self._applied or _named(at, _TRIANGLES) or any(
                self._is_mask(condition, at, inputs) for condition in _conditions(at))
            above = [n for n in _values(at) if n not in seen]
            seen.update(above)
            frontier += above
        if inputs:
            self._masked[node] = found
        return found

    def _becomes_masked(self, product: Node, softmax: bool) -> bool:
        """Whether a mask is applied to the results of a product before the next one reads them."""
        mixing = ("aten.mul.", *(("aten.add.", "aten.sub.") if softmax else ()))
        frontier, seen = [(product, 0)], {product}
        if _named(product, _WITH_A_SUM) and self._masks(product.all_input_nodes[0], product, softmax):
            self._applied.add(product)
            return True
        while frontier:
            at, depth = frontier.pop()
            for user in at.users:
                if user in seen or user.op != "call_function" or is_backward(user) or not _elementwise(user):
                    continue
                seen.add(user)
                if any(self._masks(other, user, _named(user, mixing)) for other in _tensors(user) if other is not at):
                    self._applied.add(user)
                    return True
                if depth < _DEPTH:
                    frontier.append((user, depth + 1))
        return False

    def _masks(self, other: Node, user: Node, foreign: bool) -> bool:
        """Whether ``user`` masks its values by ``other``."""
        if _is_condition(other):
            return self._is_mask(other, user)
        return self._is_masked(other) or foreign and self._is_foreign(other, user)

    def _is_mask(self, condition: Node, user: Node, inputs: bool = True) -> bool:
        """Whether ``user`` reads a condition on other things than its values: not x > 0 of an activation function."""
        sources = self._sources(condition)
        if sources is None or not _wide(condition) or (sources and not inputs):
            return False
        return all(not sources & (self._sources(n) or set()) for n in _tensors(user) if n is not condition)

    def _is_foreign(self, other: Node, user: Node) -> bool:
        """Whether ``user`` combines what a product has computed with an input of the model that may be a mask."""
        sources = self._sources(other)
        return bool(sources and not sources <= self.parameters and _wide(other)
                    and any(self._sources(n) is None for n in _tensors(user)))

    def _sources(self, node: Node) -> set[Node] | None:
        """The inputs of the graph that a tensor is computed from; None where a product or a random number is too."""
        if node in self._inputs:
            return self._inputs[node]
        found: set[Node] | None = set()
        frontier, seen = [node], {node}
        while frontier and found is not None:
            at = frontier.pop()
            if at.op != "call_function":
                found.add(at)
            elif _named(at, _PRODUCTS) or torch.Tag.nondeterministic_seeded in getattr(at.target, "tags", ()):
                found = None
            else:
                above = [n for n in _tensors(at) if n not in seen]
                seen.update(above)
                frontier += above
        self._inputs[node] = found
        return found


def _named(node: Node, names: tuple[str, ...]) -> bool:
    return node.op == "call_function" and str(node.target).startswith(names)


def _tensors(node: Node) -> list[Node]:
    """The nodes with tensors, not sizes, that a node reads."""
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), (torch.Tensor, list, tuple))]


def _is_condition(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.bool


def _conditions(node: Node) -> list[Node]:
    """The conditions that a node selects by, multiplies with or turns into numbers; itself if it is one."""
    if _is_condition(node):
        return [node]
    return [n for n in _above(node) if _is_condition(n)]


def _values(node: Node) -> list[Node]:
    """The numbers that a node is computed from, as far as the graph computes them."""
    return [n for n in _above(node) if n.op == "call_function" and not _is_condition(n)]


def _above(node: Node) -> list[Node]:
    """The tensors that give a node its values: not the positions of a lookup; none of a count, and of products only
    the scores whose heads one mixes."""
    if node.op != "call_function" or _named(node, _PRODUCTS):
        scores = mixed_heads(node)
        return [] if scores is None else [scores]
    if _named(node, _COUNTS) and not val(node).dtype.is_floating_point:
        return []
    return _tensors(node)[:1] if _named(node, _LOOKUPS) else _tensors(node)


def _wide(node: Node) -> bool:
    """Whether a tensor has a value for each column, not one for whole rows."""
    size: Any = shape(node)
    return bool(size) and not (isinstance(size[-1], int) and size[-1] == 1)


def _elementwise(node: Node) -> bool:
    """Whether every element of a node is computed from one element of each thing that it reads, or from one of each
    head."""
    return (node.target in _UNMIXED or torch.Tag.pointwise in getattr(node.target, "tags", ())
            or _named(node, ("prims.convert_element_type.",)) or mixed_heads(node) is not None)
