"""The rules of the IR, checked between all stages: which of its ops may stand in a graph, and what holds of each node.

A violation is a bug of ours, or of a pass that the user has registered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from torch.fx import Node

from quartet.lowering import ir
from quartet.lowering.ir.graph import is_backward, shape, val
from quartet.lowering.ir.op import Op, op_of, ops
from quartet.lowering.ir.operands import ROWS, SCALED, Operand, Product, given, quantizer_of
from quartet.lowering.ir.ops import grouped, inspect, outliers, weights
from quartet.lowering.ir.ops import state as slots
from quartet.lowering.ir.views import Quantize, QuantizeGroups
from quartet.passes.sites import SITE_KEY, Quantized
from quartet.passes.state import State
from quartet.runtime.sizes import same

LOWERING = "lower"  # from this pass on all ops may stand
SPECIFICATION: dict[str, tuple[Callable[..., Any], ...]] = {  # pass → the ops that may stand in a graph from it on
    "embed": (slots.SEED, ir.SIGNS, ir.FIXED_SIGNS, ir.HADAMARD, ir.AMAX, ir.QUANTIZE, ir.DEQUANTIZE, ir.APPLY_MASK),
    "outliers": (outliers.SPLIT_OUTLIERS, outliers.SPARSE_MM),
    "estimator": (weights.DGE,),
    "toward": (slots.AVERAGE_ADVANCE, slots.AVERAGE_READ, weights.TOWARD),
    "rotate": (slots.SEED, ir.SIGNS, ir.FIXED_SIGNS, ir.HADAMARD, grouped.GROUP_LAYOUT, grouped.PAD_GROUPS,
               grouped.GATHER_ROWS, grouped.GROUPED_MM),
    "quantize": (slots.AMAX_BEGIN, slots.AMAX_READ, ir.AMAX, ir.QUANTIZE, grouped.QUANTIZE_GROUPS, ir.DEQUANTIZE,
                 ir.APPLY_MASK, *SCALED),
    "delayed": (slots.AMAX_SEEN, slots.AMAX_NOTE, slots.AMAX_RECORD),
    "stay_padded": (grouped.CLEAR_ROWS,),
    "draw": (ir.SIGN_TABLE,),
    "observe": (inspect.OBSERVE,),
    "check": (inspect.CHECK_FINITE,),
}


class BrokenGraph(AssertionError):
    """A pass left the graph in a state that its specification forbids."""


def table() -> str:
    """The specification in Markdown."""
    rows = [f"| `{name}` | {', '.join(f'`{op.name}`' for op in _ops_of(targets))} |"
            for name, targets in SPECIFICATION.items()]
    return "\n".join(("| from | these may stand |", "|---|---|", *rows,
                      f"| `{LOWERING}` | all; of the products only those whose kernel computes them as they are |"))


class Rules:
    """What has to hold of one graph after each of the passes. What stood in it before them may stand to the end."""

    def __init__(self, state: State) -> None:
        self._state, self._allowed = state, set(_ops_of(node.target for node in state.gm.graph.nodes))

    def check(self, after: str, registered: bool = False) -> None:
        """Raise BrokenGraph naming the pass, the node and the rule.

        ``registered``: the pass is the user's own; the ops that it brings may stand from it on.
        """
        graph = self._state.gm.graph
        self._allowed.update(ops() if after == LOWERING else _ops_of(SPECIFICATION.get(after, ())))
        if registered:
            self._allowed.update(_ops_of(node.target for node in graph.nodes))
        ours = [(node, op) for node in graph.nodes if (op := op_of(node.target)) is not None]
        for node, op in ours:
            if op not in self._allowed:
                _violated(after, node, "an op stands where SPECIFICATION in passes/verify.py has it: "
                                       f"no {op.name!r} so far")
        divided = any(is_backward(node) for node in graph.nodes)  # what an evaluation captures carries no tags
        _check_nodes((node for node, _ in ours), divided, after)
        if after == LOWERING:
            _check_lowered(self._state)


def _ops_of(targets: Iterable[Any]) -> tuple[Op, ...]:
    return tuple(op for op in map(op_of, targets) if op is not None)


def _check_nodes(nodes: Iterable[Node], divided: bool, after: str) -> None:
    """What holds of each node of ours; ``divided``: into forward and backward."""
    for node in nodes:
        _require("val" in node.meta, after, node, "a node has a value")
        _require(not divided or "partitioner_tag" in node.meta, after, node, "a node has a direction")
        _require(is_backward(node) or not any(is_backward(i) for i in node.all_input_nodes), after, node,
                 "a forward node reads no backward node")
        if node.target is ir.QUANTIZE:
            made = Quantize.of(node)
            _require((made.seed is not None) == made.spec.stochastic, after, node, "stochastic quantisers have a seed")
            _require((made.amax is not None) == made.spec.takes_amax, after, node,
                     "quantisers that take an amax have one")
        if SITE_KEY in node.meta and node.target in SCALED:  # not of an earlier compilation
            _check_gemm(node, after)


def _check_lowered(state: State) -> None:
    """No product is left that a kernel was to rewrite."""
    sites = {site.index: site for site in state.at(Quantized)}
    for node in state.gm.graph.nodes:
        if SITE_KEY in node.meta and node.target in SCALED:
            index, role = node.meta[SITE_KEY]
            kernel = sites[index].decisions[role].kernel
            _require(kernel is None or kernel.lower is None, LOWERING, node,
                     f"a kernel rewrites what falls to it, and {kernel and kernel.name!r} has left this")


def _check_gemm(node: Node, after: str) -> None:
    product, depths = Product.of(node), []
    groups = (QuantizeGroups,) if product.kind.over_tokens else ()
    for operand in product.operands:
        spec = operand.spec
        (code, width), (scale, _) = ir.code_layout(spec, 32), ir.scale_layout(spec, 32, 32)
        _require(val(operand.codes).dtype is code, after, node, f"{spec} has codes of {code}")
        _require(val(operand.scales).dtype is scale, after, node, f"{spec} has scales of {scale}")
        depths.append(shape(operand.codes)[1] * (32 // width))
        _require(operand.layout == ROWS or spec.commutes_with_transpose, after, node,
                 f"codes of {spec} cannot be transposed")
        _check_maker(operand, groups if groups and spec.block == "row" else (Quantize,), node, after)
    _require(same(*depths), after, node, f"both operands contract the same length, not {depths}")


def _check_maker(operand: Operand, views: tuple[type[Any], ...], node: Node, after: str) -> None:
    """What an operand is said to be against the quantiser that made it, where that is found; where another node stands
    between them, whether rows may come from anywhere."""
    spec, made, scaled = operand.spec, quantizer_of(operand.codes), quantizer_of(operand.scales)
    if given(operand.codes) and given(operand.scales):
        return
    if made is None or scaled is None:
        _require(spec.row_local, after, node, f"only rows of a row-local quantiser are moved, and {spec} is none")
        _require(same(shape(operand.codes)[0], shape(operand.scales)[0]), after, node,
                 "codes and scales have the same rows")
        return
    _require(made.node is scaled.node, after, node, "codes and scales come from one quantiser")
    _require(isinstance(made.view, views) and made.view.spec == spec, after, node,
             "a GEMM reads an operand in the format its quantiser wrote")
    _require(made.rotation == operand.rotation or made.rotation != 0, after, node,
             "a quantiser follows its Hadamard transform at once: a pass that puts a node before quantisers is to come "
             "before 'rotate', register_pass(…, after=\"plan\")")
    _require((made.rotation, made.layout) == (operand.rotation, operand.layout), after, node,
             "a GEMM says how its operands are rotated and how they lie")


def _require(held: bool, after: str, node: Node, rule: str) -> None:
    if not held:
        _violated(after, node, rule)


def _violated(after: str, node: Node, rule: str) -> NoReturn:
    raise BrokenGraph(f"after pass '{after}', node {node.format_node()}: violated '{rule}'")
