"""The weights of experts, quantised inside of the products that read them (``quartet.lowering.ir.ops.experts``).

Where forward and backward may keep what they make of a parameter for the micro-batches of an optimizer step, each
makes its own orientation of the codes, once a step, from one scale; codes of weights are then in no graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from quartet.kernels import reference
from quartet.kernels.spec import QuantSpec
from quartet.lowering import ir
from quartet.lowering.ir.graph import Builder, Traced, aten, is_backward, val
from quartet.lowering.ir.operands import SCALED, Kind, Product
from quartet.lowering.ir.ops import experts as ops
from quartet.lowering.ir.products import shown_stack
from quartet.lowering.ir.views import Quantize
from quartet.lowering.targets.chains import REUSABLE
from quartet.lowering.targets.fp8_products import marked, per_row


@dataclass(frozen=True)
class Experts:
    """A parameter ``[E, R, C]`` whose matrices, or their transposes where ``flipped``, a quantiser reads."""

    w: Node
    flipped: bool
    spec: QuantSpec
    multiplier: Node
    scale: Node


def makes_codes(quantizer: Node) -> bool:
    """``Kernel.makes_codes``: of parameters as they lie, with one scale for all experts."""
    made = Quantize.of(quantizer)
    stack = shown_stack(made.x)
    if stack is None or made.spec.block != "tensor" or made.spec.rule not in ("amax", "amax_pow2"):
        return False
    w, _ = stack
    return w.op == "placeholder" and val(w).dtype == val(made.x).dtype and val(w).numel() > 0


def experts_of(graph: Graph, quantizers: list[Node], traced: Traced) -> dict[Node, Experts]:
    """Those of the quantisers whose codes the products are to make, which nothing but products of groups reads."""
    found: dict[Node, Experts] = {}
    scales: dict[tuple[Node, str], list[Node]] = {}
    for node in quantizers:
        if REUSABLE not in node.meta or not makes_codes(node) or not _multiplied_alone(node):
            continue
        made = Quantize.of(node)
        spec, stack = made.spec, shown_stack(made.x)
        assert stack is not None
        w, flipped = stack
        if (w, str(spec)) not in scales:
            build = Builder(graph, like=node, before=node, backward=is_backward(node))
            scales[w, str(spec)] = traced(build, _scale_by(spec), [build(ops.AMAX, w)], "experts", spec)
        found[node] = Experts(w, flipped, spec, *scales[w, str(spec)])
    return found


def _scale_by(spec: QuantSpec) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
    def scale(amax: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(map(ir.STORE, reference.scale_of_amax(amax, spec)))

    return scale


def multiply(build: Builder, kind: Kind, a: Node, a_scales: Node, experts: Experts, turned: bool,
             dtype: torch.dtype) -> Node:
    """``A · Bᵀ`` of row-major codes in groups of tokens, its columns rounded up to 16.

    ``turned``: of B the matrices are the transposes of those that are quantised.
    """
    a, a_scales = build.padded(a, cols=ops.ALIGN), build(aten.reshape.default, per_row(build, a, a_scales), [-1])
    return marked(build(ops.MM, a, a_scales, experts.w, experts.multiplier, experts.scale, kind.ends,
                        str(experts.spec), turned != experts.flipped, dtype, True))


def _multiplied_alone(quantizer: Node) -> bool:
    """Whether all that becomes of the codes is operand B of a product of groups in the same direction."""
    waiting = [user for item in quantizer.users for user in item.users]
    while waiting:
        user = waiting.pop()
        if user.target in SCALED:
            kind = Product.of(user).kind
            if kind.ends is None or kind.over_tokens or is_backward(user) != is_backward(quantizer):
                return False
        elif user.target in (aten.reshape.default, aten.permute.default):
            waiting += user.users
        else:
            return False
    return True
