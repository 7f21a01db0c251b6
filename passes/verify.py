"""The rules of the IR, checked between all stages. A violation is a bug of ours, never of the user's."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from quartet.lowering import ir
from quartet.lowering.ir.graph import aten, is_backward, shape, val
from quartet.lowering.ir.operands import ROWS, SCALED, Operand, Product, quantizer_of
from quartet.lowering.ir.views import Quantize, QuantizeGroups
from quartet.passes.sites import SITE_KEY
from quartet.passes.state import State
from quartet.runtime.sizes import same


class BrokenGraph(AssertionError):
    """A pass left the graph in a state that its specification forbids."""


def verify(state: State, after: str) -> None:
    """Raise BrokenGraph naming the pass, the node and the rule."""
    nodes = state.gm.graph.nodes
    tagged = any("partitioner_tag" in n.meta for n in nodes if n.target is not aten.copy_.default)
    for node in state.gm.graph.nodes:
        if node.op != "call_function" or "quartet" not in str(node.target):
            continue
        _require("val" in node.meta, after, node, "a node has a value")
        _require(not tagged or "partitioner_tag" in node.meta, after, node, "a node has a direction")
        _require(is_backward(node) or not any(is_backward(i) for i in node.all_input_nodes), after, node,
                 "a forward node reads no backward node")
        if node.target is ir.QUANTIZE:
            made = Quantize.of(node)
            _require((made.seed is not None) == made.spec.stochastic, after, node, "stochastic quantisers have a seed")
            _require((made.amax is not None) == made.spec.takes_amax, after, node,
                     "quantisers that take an amax have one")
        if SITE_KEY in node.meta and node.target in SCALED:  # not of an earlier compilation
            _check_gemm(node, after)


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
    if made is None or scaled is None:
        _require(spec.row_local, after, node, f"only rows of a row-local quantiser are moved, and {spec} is none")
        _require(same(shape(operand.codes)[0], shape(operand.scales)[0]), after, node,
                 "codes and scales have the same rows")
        return
    _require(made.node is scaled.node, after, node, "codes and scales come from one quantiser")
    _require(isinstance(made.view, views) and made.view.spec == spec, after, node,
             "a GEMM reads an operand in the format its quantiser wrote")
    _require((made.rotation, made.layout) == (operand.rotation, operand.layout), after, node,
             "a GEMM says how its operands are rotated and how they lie")


def _require(held: bool, after: str, node: Node, rule: str) -> None:
    if not held:
        raise BrokenGraph(f"after pass '{after}', node {node.format_node()}: violated '{rule}'")
