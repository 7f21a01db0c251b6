"""The rules of the IR, checked between all stages. A violation is a bug of ours, never of the user's."""

from __future__ import annotations

from torch.fx import Node

from quartet.kernels.spec import QuantSpec
from quartet.lowering import ir
from quartet.lowering.ir.graph import aten, is_backward
from quartet.lowering.ir.grouped import QUANTIZE_GROUPS, SCALED_GROUPED_MM
from quartet.lowering.ir.products import SCALED
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
            spec = QuantSpec.parse(str(node.args[1]))
            _require((node.args[2] is not None) == spec.stochastic, after, node, "stochastic quantisers have a seed")
            _require((len(node.args) > 4) == spec.takes_amax, after, node, "quantisers that take an amax have one")
        if SITE_KEY in node.meta and node.target in SCALED:  # not of an earlier compilation
            _check_gemm(node, after)


def _check_gemm(node: Node, after: str) -> None:
    a, a_scales, b, b_scales, a_spec, b_spec = node.args[:6]
    depths, grouped = [], node.target is SCALED_GROUPED_MM and node.args[8]
    for codes, scales, text in ((a, a_scales, a_spec), (b, b_scales, b_spec)):
        assert isinstance(codes, Node) and isinstance(scales, Node) and isinstance(text, str)
        spec = QuantSpec.parse(text)
        (code, width), (scale, _) = ir.code_layout(spec, 32), ir.scale_layout(spec, 32, 32)
        _require(codes.meta["val"].dtype is code, after, node, f"{spec} has codes of {code}")
        _require(scales.meta["val"].dtype is scale, after, node, f"{spec} has scales of {scale}")
        depths.append(codes.meta["val"].shape[1] * (32 // width))
        maker, flipped = ir.quantizer_of(codes)
        _require(maker is scales.args[0], after, node, "codes and scales come from one quantiser")
        _require(not flipped or spec.commutes_with_transpose, after, node, f"codes of {spec} cannot be transposed")
        makers = (QUANTIZE_GROUPS,) if grouped and spec.block == "row" else (ir.QUANTIZE,)
        _require(maker.target in makers and maker.args[1] == text, after, node,
                 "a GEMM reads an operand in the format its quantiser wrote")
    _require(same(*depths), after, node, f"both operands contract the same length, not {depths}")


def _require(held: bool, after: str, node: Node, rule: str) -> None:
    if not held:
        raise BrokenGraph(f"after pass '{after}', node {node.format_node()}: violated '{rule}'")
