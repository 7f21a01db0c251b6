"""X, W and E of the sites, and their gradients, as tensors of the graph as it is after all that has been rewritten."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch.fx import Node

from quartet.lowering import ir
from quartet.lowering.ir.graph import aten, shape
from quartet.lowering.ir.operands import ROWS, SCALED, TRANSPOSED, Product, quantizer_of
from quartet.lowering.ir.products import shown_stack
from quartet.lowering.ir.views import Hadamard
from quartet.passes.matrices import Operand
from quartet.passes.sites import SITE_KEY, Found, Rotated
from quartet.passes.state import State
from quartet.runtime.sizes import same_sizes
from quartet.runtime.view_ops import CAST


@dataclass(frozen=True)
class Seen:
    """What the graph has of a site: ``"x"``, ``"w"`` and ``"e"``, and its gradients by role, each a node and whether it
    lies transposed; of groups, where those of its tokens end."""

    operands: Mapping[str, Operand]
    gradients: Mapping[str, Operand]
    ends: Node | None = None


class Originals:
    """Finds them."""

    def __init__(self, state: State) -> None:
        self._state, self._standing = state, set(state.gm.graph.nodes)
        self._products = {node.meta[SITE_KEY]: node for node in state.gm.graph.nodes
                          if node.target in SCALED and SITE_KEY in node.meta}

    def now(self, node: Node) -> Node | None:
        """What stands for a node, None where nothing reads it any more."""
        found = self._state.current(node)
        return found if found in self._standing else None

    def of(self, site: Found, letter: str) -> Operand | None:
        """``"x"`` ``[tokens, in]``, ``"w"`` ``[out, in]`` or ``"e"`` ``[tokens, out]`` of a site, of a batch and of
        experts with an axis before, and whether it lies transposed; None where the graph has it only in a form that
        something has been done to."""
        gradients = [gradient.e for gradient in site.gradients.values()]
        given = {"x": site.x, "w": site.w, "e": gradients[0] if gradients else None}[letter]
        if given is None:
            return None
        node = self.now(given[0])
        return self._read(site, letter) if node is None else (node, given[1])

    def seen(self, site: Found) -> Seen:
        """All of a site. Of groups whose tokens the graph has padded only, padded."""
        operands = {letter: found for letter in "xwe" if (found := self.of(site, letter)) is not None}
        gradients = {role: (out, gradient.flipped) for role, gradient in site.gradients.items()
                     if (out := self.now(gradient.node)) is not None}
        if site.groups is None:
            return Seen(operands, gradients)
        plain = Seen(operands, gradients, self._state.current(site.groups.offs))
        tokens = (site.x[0], *(gradient.e[0] for gradient in site.gradients.values()))
        whole = None not in map(self.now, tokens) and len(gradients) == len(site.gradients)
        return plain if whole else self._padded(site, plain) or plain

    def _read(self, site: Found, letter: str) -> Operand | None:
        """What the quantiser of an operand reads, where the views of the model have gone."""
        role, side = {"x": ("fprop", "a"), "w": ("fprop", "b"), "e": ("dgrad", "a")}[letter]
        if turned := letter == "e" and (site.index, role) not in self._products:
            role = "wgrad"  # of an input that needs no gradient; its operand a is E's transpose
        product = self._products.get((site.index, role))
        found = None if product is None else quantizer_of(getattr(Product.of(product), side).codes)
        if found is None or isinstance(site, Rotated) and site.gemms[role].gemm.outer is not None:
            return None
        rotated = Hadamard.into(found.view.x)
        x = found.view.x if rotated is None else rotated.x
        operand = x, turned != (found.layout != ROWS)
        if site.batch is not None or site.groups is not None and letter == "w":
            stack = None if found.layout == TRANSPOSED else shown_stack(x)
            if stack is None:
                return None
            operand = stack[0], stack[1] != operand[1]
        return operand if self._has_sizes(site, letter, operand) else None

    def _has_sizes(self, site: Found, letter: str, operand: Operand) -> bool:
        """Whether nothing has padded it; the tokens of groups may be."""
        rows, cols = {"x": (site.m, site.k), "w": (site.n, site.k), "e": (site.m, site.n)}[letter]
        node, flipped = operand
        found = shape(node)[-2:][::-1] if flipped else shape(node)[-2:]
        if site.groups is not None and letter != "w":
            return same_sizes(found[1:], (cols,))
        return same_sizes(found, (rows, cols))

    def _padded(self, site: Found, plain: Seen) -> Seen | None:
        """X, E and gX as the products read and leave them, with the ends of padded groups."""
        fprop, dgrad = (self._products.get((site.index, role)) for role in ("fprop", "dgrad"))
        tokens = {letter: operand for letter in "xe" if (operand := self._read(site, letter)) is not None}
        if fprop is None or len(tokens) < 2:
            return None
        gradients = {role: out for role, out in plain.gradients.items() if role != "dgrad"}
        if dgrad is not None and same_sizes(shape(out := _result(dgrad))[1:], (site.k,)):
            gradients["dgrad"] = out, False
        return Seen({**plain.operands, **tokens}, gradients, Product.of(fprop).kind.ends)


def _result(product: Node) -> Node:
    """What a product becomes before its rows are taken out: masked, rotated back, without padded columns."""
    while len(product.users) == 1:
        user, = product.users
        undone = user.target is ir.HADAMARD and Hadamard.of(user).inverse
        if not undone and user.target not in (ir.APPLY_MASK, CAST, aten.slice.Tensor):
            break
        product = user
    return product
