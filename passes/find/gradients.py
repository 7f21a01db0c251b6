"""Which products are the gradients of which forward product: dgrad reads the same weight, wgrad the same activation.

    dgrad   gX = E·W     or  gXᵀ = Wᵀ·Eᵀ
    wgrad   gW = Eᵀ·X    or  gWᵀ = Xᵀ·E

in either orientation: autograd writes one or the other by the strides of the operands. What autograd made shares the
``seq_nr`` of its forward product. What a custom Function's backward computes is told by its operands: by a dgrad and a
wgrad of one E, by the parameter whose gradient it becomes, by the result that E is computed of, if a loss is taken in
chunks and makes its gradients in forward. Where several forward products are as likely, it belongs to none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch.fx import Graph, Node

from quartet.lowering.ir.graph import BY_HAND, is_backward, outputs, shape, source_of, val
from quartet.passes.find.values import Values
from quartet.passes.matrices import Operand, canonical, operands
from quartet.passes.sites import Found, Gradient
from quartet.runtime.sizes import same_sizes
from quartet.runtime.view_ops import CAST

ROLES = ("dgrad", "wgrad")


@dataclass(frozen=True)
class Reading:
    """One way to read a product: as the gradient of a role of a site; E as it is stored, and a key of its values."""

    node: Node
    site: Found
    role: str
    flipped: bool
    gradient: Operand
    key: tuple[int, bool]

    @property
    def numbered(self) -> bool:
        """Whether autograd says so."""
        forward = self.site.forward.node
        return self.node.meta.get("seq_nr") == forward.meta.get("seq_nr") and not by_hand(self.node)

    def attached(self) -> Gradient:
        """The product that it is, with E behind its views where that is a matrix of the same kind."""
        node, turned = self.gradient
        base, flipped = canonical(node)
        e = (base, flipped != turned) if len(shape(base)) == len(shape(self.node)) else self.gradient
        return Gradient(self.node, self.flipped, e, val(self.node).dtype)


def by_hand(node: Node) -> bool:
    """Whether a user's program wrote the product of a gradient, so that its ``seq_nr`` says nothing."""
    return BY_HAND in node.meta or not is_backward(node)


def attach(graph: Graph, values: Values, sites: Sequence[Found],
           candidates: Iterable[Node]) -> tuple[list[Found], set[Node]]:
    """The sites with their gradients, and the candidates that are one."""
    found = _Readings(values, sites)
    readings = {node: found.of(node) for node in candidates}
    given = {site.index: site for site in sites}
    claimed: set[Node] = set()

    def free(reading: Reading) -> bool:
        return reading.role not in given[reading.site.index].gradients

    def claim(reading: Reading) -> None:
        claimed.add(reading.node)
        given[reading.site.index] = given[reading.site.index].with_gradient(reading.role, reading.attached())

    for reading in _pairs([r for some in readings.values() for r in some]):
        if free(reading) and reading.node not in claimed:
            claim(reading)
    becomes = parameters_of_gradients(graph)
    for node, some in readings.items():
        if node not in claimed:
            one = _only(node, [replace(r, site=given[r.site.index]) for r in some if free(r)], values, becomes)
            if one is not None:
                claim(one)
    return list(given.values()), claimed


class _Readings:
    """Finds the sites that a product shares an operand with."""

    def __init__(self, values: Values, sites: Sequence[Found]) -> None:
        self.values = values
        self.by_operand: dict[tuple[str, int, bool], list[Found]] = {}
        for site in sites:
            for role, operand in (("dgrad", site.w), ("wgrad", site.x)):
                self.by_operand.setdefault((role, *self.key(operand)), []).append(site)

    def key(self, operand: Operand) -> tuple[int, bool]:
        """The values of an operand, without views, and casts that lose nothing, and whether it is their transpose."""
        node, flipped = operand
        while True:
            base, turned = canonical(node)
            flipped = flipped != turned
            if not _widens(base):
                number, turned = self.values.matrix(base)
                return number, flipped != turned
            node = source_of(base)

    def of(self, node: Node) -> list[Reading]:
        u, v = operands(node)
        left, right = self.key((u, False)), self.key((v, False))
        forms = (("dgrad", False, right, (u, False)), ("dgrad", True, (left[0], not left[1]), (v, True)),
                 ("wgrad", False, right, (u, True)), ("wgrad", True, (left[0], not left[1]), (v, False)))
        return [Reading(node, site, role, flipped, gradient, self.key(gradient))
                for role, flipped, shared, gradient in forms
                for site in self.by_operand.get((role, *shared), ())
                if _may_be_gradient(gradient[0], site.forward.node) and _fits(gradient, site)]


def _widens(node: Node) -> bool:
    if node.target is not CAST:
        return False
    before, after = val(source_of(node)).dtype, val(node).dtype
    return before.is_floating_point and after.is_floating_point and before.itemsize < after.itemsize


def _may_be_gradient(e: Node, forward: Node) -> bool:
    """Whether what stands in E's place is made in backward, or of the result of forward's product."""
    return is_backward(e) or _depends(e, forward)


def _fits(gradient: Operand, site: Found) -> bool:
    """Whether what stands in E's place has its sizes."""
    *batch, rows, cols = shape(gradient[0])
    sizes = (cols, rows) if gradient[1] else (rows, cols)
    stacked = [] if site.batch is None else [site.batch]
    return same_sizes([*batch, *sizes], [*stacked, site.m, site.n])


def _pairs(readings: list[Reading]) -> list[Reading]:
    """The readings as dgrad and wgrad of one site with one E: nothing but the gradients of the site is that.

    What autograd made comes first, so that of two sites with the same operands each gets its own.
    """
    halves: dict[tuple[int, tuple[int, bool]], dict[str, Reading]] = {}
    for reading in readings:
        if reading.numbered or by_hand(reading.node):
            halves.setdefault((reading.site.index, reading.key), {}).setdefault(reading.role, reading)
    whole = [both for both in halves.values() if len(both) == 2 and both["dgrad"].node is not both["wgrad"].node]
    whole.sort(key=lambda both: not all(r.numbered for r in both.values()))
    return [both[role] for both in whole for role in ROLES]


def _only(node: Node, readings: list[Reading], values: Values, becomes: Callable[[Node], set[Node]]) -> Reading | None:
    """The one reading that holds, if there is one."""
    if not by_hand(node):
        return next((r for r in readings if r.numbered), None)
    tests: tuple[Callable[[Reading], bool], ...] = (
        lambda r: True,
        lambda r: any(_key_of(values, other.e) == r.key for other in r.site.gradients.values()),
        lambda r: r.role == "wgrad" and bool(_roots(r.site.w[0]) & becomes(node)),
        lambda r: not is_backward(node) and _depends(r.gradient[0], r.site.forward.node),
    )
    for test in tests:
        left = list({(r.site.index, r.role): r for r in readings if test(r)}.values())
        if len(left) == 1:
            return left[0]
    return None


def _key_of(values: Values, operand: Operand) -> tuple[int, bool]:
    return _Readings(values, ()).key(operand)


def _depends(node: Node, source: Node) -> bool:
    """Whether a node is computed of another one."""
    frontier, seen = [node], {node}
    while frontier:
        at = frontier.pop()
        if at is source:
            return True
        fresh = [n for n in at.all_input_nodes if n not in seen and not n < source]
        seen.update(fresh)
        frontier += fresh
    return False


def _roots(node: Node) -> set[Node]:
    """The inputs of the graph that a node is computed of."""
    frontier, seen = [node], {node}
    while frontier:
        fresh = [n for n in frontier.pop().all_input_nodes if n not in seen]
        seen.update(fresh)
        frontier += fresh
    return {n for n in seen if n.op == "placeholder"}


def parameters_of_gradients(graph: Graph) -> Callable[[Node], set[Node]]:
    """A function: node of backward → the inputs whose gradient it is a part of."""
    output = graph.output_node()
    named = {str(node.meta["desc"]): node for node in graph.find_nodes(op="placeholder") if "desc" in node.meta}
    results = zip(outputs(graph), output.meta.get("desc") or (), strict=False)
    owner = {node: named[str(of)] for node, desc in results
             if isinstance(node, Node) and str(of := getattr(desc, "grad_of", None)) in named}
    return partial(_reached, owner)


def _reached(owner: dict[Node, Node], node: Node) -> set[Node]:
    frontier, seen = [node], {node}
    while frontier:
        fresh = [n for n in frontier.pop().users if n not in seen]
        seen.update(fresh)
        frontier += fresh
    return {owner[n] for n in seen if n in owner}


def not_needed_in_forward(graph: Graph) -> set[Node]:
    """Operators of forward that none of its results is computed of: what is made for backward alone."""
    output = graph.output_node()
    results = outputs(graph)
    descs = output.meta.get("desc") or [None] * len(results)
    frontier = [node for node, desc in zip(results, descs, strict=True)
                if isinstance(node, Node) and not is_backward(node) and not _of_gradient(desc)]
    operators = [n for n in graph.nodes if n.op == "call_function" and not is_backward(n)]
    frontier += [n for n in operators if not n.users and n.is_impure()]
    needed = set(frontier)
    while frontier:
        fresh = [n for n in frontier.pop().all_input_nodes if n not in needed]
        needed.update(fresh)
        frontier += fresh
    return {n for n in operators if n not in needed}


def _of_gradient(desc: Any) -> bool:
    while desc is not None and not hasattr(desc, "grad_of"):
        desc = getattr(desc, "base", None)
    return desc is not None
