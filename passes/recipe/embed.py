"""Quantise the rows that embeddings gather: weights alone, since a gather multiplies nothing.

    rows[tokens, dim] = Q(table·H)·Hᵀ [indices]      Q, H: operand b of the recipe's fprop and its rotation

A row's scales lie within the row in most formats: there the gathered rows are quantised, and no more. A format whose
scale hangs on the whole table gets the table's maximum, or where that does not do, the table itself is quantised first.
The gradient goes straight through; the rows of a clipping quantiser are masked in the rotated basis, as wgrad's are:

    gTable[indices] += ([E·H] ⊙ M)·Hᵀ
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from quartet.kernels.reference.philox import MAX_SITE, Draw
from quartet.kernels.spec import QuantSpec, dtype_name
from quartet.lowering import ir, registry
from quartet.lowering.ir.graph import (
    Builder,
    argument,
    aten,
    editing,
    is_backward,
    remaining,
    replace_all,
    shape,
    source_of,
    val,
)
from quartet.lowering.ir.views import ApplyMask, Dequantize, FixedSigns, Hadamard, Quantize, Signs
from quartet.lowering.recipe.types import Rotation
from quartet.passes.find.find_matmuls import left_alone, parameter_origins
from quartet.passes.graph_pass import graph_pass
from quartet.passes.naming import module_name, module_of
from quartet.passes.plan.plan import DTYPES, UnsupportedMatmul
from quartet.passes.quantize.randomness import draw_seed
from quartet.passes.state import State
from quartet.runtime.sizes import same_sizes

EMBEDDING = aten.embedding.default
_BAG = "aten._embedding_bag"


@dataclass(frozen=True)
class Quantizer:
    """What is done to a row: rotated, quantised, dequantised, rotated back. ``number`` tells its random bits apart."""

    spec: QuantSpec
    rotation: Rotation | None
    number: int

    @property
    def of_rows(self) -> bool:
        """Whether the rows alone, with at most the table's maximum, give what the quantised table would."""
        whole = self.spec.takes_amax and not self.spec.tile and self.rotation is None
        return self.spec.row_local or whole


@graph_pass(optional=True, summary="rows that embeddings gather, quantised where the policy names them")
def embed(state: State) -> None:
    """Quantise the rows of the embeddings that the policy names; record all. Raises UnsupportedMatmul when strict."""
    nodes = [n for n in state.gm.graph.find_nodes(op="call_function", target=EMBEDDING) if not is_backward(n)]
    bags = [n for n in state.gm.graph.nodes if str(n.target).startswith(_BAG) and not is_backward(n)]
    if not nodes and not bags:
        return
    origin = parameter_origins(state)
    with editing(state.gm):
        for index, node in enumerate(nodes):
            _embedding(state, node, origin, MAX_SITE - index)
    for node in bags:
        (vocabulary, width), rows = shape(node.all_input_nodes[0]), node.meta["val"][0].shape[0]
        reason = "a bag sums rows as it gathers them; only single rows are quantised"
        state.leave(left_alone(node, "embedding", "fprop", (rows, width, vocabulary),
                               val(node.all_input_nodes[0]).dtype, reason))


def _embedding(state: State, node: Node, origin: dict[Node, str], number: int) -> None:
    table = source_of(node)
    vocabulary, width = shape(table)
    mnk = (val(node).numel() // width if width else 0, width, vocabulary)
    fqn = module_of(node) or module_name(origin.get(table, ""))
    resolution = state.config.resolve("embedding", fqn, *mnk)
    choice = resolution.fprop
    record = left_alone(node, "embedding", "fprop", mnk, val(node).dtype, choice.reason, fqn)
    gemm = choice.gemm
    if gemm is None or (state.config.where_it_pays and choice.rule is None):
        reason = choice.reason if gemm is None else "it is not known to pay: name it in a rule"
        state.leave(replace(record, reason=reason))
        return
    quantizer = None if gemm.b.spec is None else Quantizer(gemm.b.spec, gemm.rotation, number)
    obstacle = _obstacle(state, node, table, origin, quantizer)
    if obstacle is None and quantizer is not None:
        _rewrite(state, node, table, quantizer)
        notes = () if quantizer.of_rows else ("the whole table is quantised in each forward: its scales ask for it",)
        recipe = choice.recipe.name if choice.recipe is not None else None
        state.leave(replace(record, recipe=recipe, kernel="reference", reason="", notes=notes))
        return
    if state.config.strict:
        raise UnsupportedMatmul(f"strict=True, and the embedding {fqn or node.name} ({vocabulary} rows of {width}, "
                                f"{val(node).dtype}) cannot be quantised: {obstacle}")
    state.leave(replace(record, reason=str(obstacle)))


def _obstacle(state: State, node: Node, table: Node, origin: dict[Node, str],
              quantizer: Quantizer | None) -> str | None:
    if quantizer is None:
        return "the recipe leaves weights in high precision"
    if table not in origin:
        return "its table is no parameter"
    if argument(node, "sparse"):
        return "its gradient is sparse; only dense ones are supported: sparse=False"
    if val(table).dtype not in DTYPES:
        return f"its table is {dtype_name(val(table).dtype)}; quantisers take float32, bfloat16 or float16"
    if quantizer.spec.rule == "delayed":
        return "scale rule 'delayed' needs a history, which is kept for matmuls only: use rule 'amax'"
    if any(isinstance(size, int) and size == 0 for size in (*shape(table), *shape(node))):
        return f"a size is zero (table {shape(table)}, rows {shape(node)})"
    return registry.not_generated(state.config.target_of(val(table).device), quantizer.spec)


def _rewrite(state: State, node: Node, table: Node, quantizer: Quantizer) -> None:
    build = Builder(state.gm.graph, like=node, before=node, backward=False)
    if not quantizer.of_rows:
        values, mask = _round_trip(state, build, table, quantizer, None)
        assert mask is None  # whatever has a clip mask has scales within its rows
        state.replace(node, build(EMBEDDING, values, *remaining(node)))
        return
    amax = build(ir.AMAX, table) if quantizer.spec.takes_amax else None
    size = shape(node)
    rows = build(aten.view.default, build(EMBEDDING, table, *remaining(node)), [-1, size[-1]])
    values, mask = _round_trip(state, build, rows, quantizer, amax)
    state.replace(node, build(aten.view.default, values, [build.size(s) for s in size]))
    if mask is not None:
        _mask_gradient(build, node, quantizer.rotation, *mask)


def _round_trip(state: State, build: Builder, x: Node, quantizer: Quantizer,
                amax: Node | None) -> tuple[Node, tuple[Node, Node | None] | None]:
    """What quantising leaves of ``[rows, dim]``, and the clip mask with the signs of its basis, or None without one."""
    spec, rotation, width, dtype = quantizer.spec, quantizer.rotation, shape(x)[1], val(x).dtype
    signs = None
    if rotation is not None:
        signs = _signs(state, build, rotation, quantizer.number, val(x).device)
        x = Hadamard(x, rotation.n, signs, False, torch.float32).emit(build)
    if spec.takes_amax and amax is None:
        amax = build(ir.AMAX, x)
    seed = draw_seed(state, val(x).device) if spec.stochastic else None
    bits = Draw.FPROP_B.of(quantizer.number) if spec.stochastic else 0
    q = Quantize(x, spec, seed, bits, amax).emit(build)
    values = Dequantize(build.item(q, 0), build.item(q, 1), spec, val(x).dtype, amax).emit(build)
    if rotation is not None:
        values = Hadamard(values, rotation.n, signs, True, dtype).emit(build)
    return build.contiguous(build.columns(values, width)), (build.item(q, 2), signs) if spec.mask else None


def _signs(state: State, build: Builder, rotation: Rotation, number: int, device: torch.device) -> Node | None:
    if isinstance(rotation.signs, tuple):
        return FixedSigns(list(rotation.signs), device).emit(build)
    if rotation.signs == "none":
        return None
    return Signs(draw_seed(state, device), Draw.FPROP_SIGNS.of(number), rotation.n).emit(build)


def _mask_gradient(forward: Builder, node: Node, rotation: Rotation | None, mask: Node, signs: Node | None) -> None:
    """Clear what was clipped from the gradient of the gathered rows, before it is added up in the table's."""
    makers = [n for n in forward.graph.nodes if is_backward(n) and n.op == "call_function"
              and n.meta.get("seq_nr") == node.meta.get("seq_nr")]
    given = {i for n in makers for i in n.all_input_nodes
             if i not in makers and is_backward(i) and _tensor_like(i, node)}
    if not given:
        return
    (gradient,) = given
    build = Builder(forward.graph, like=makers[0], before=makers[0], backward=True)
    width = shape(node)[-1]
    x = build(aten.view.default, build.contiguous(gradient), [-1, width])
    if rotation is not None:
        x = Hadamard(x, rotation.n, signs, False, torch.float32).emit(build)
    x = ApplyMask(x, mask).emit(build)
    if rotation is not None:
        x = Hadamard(x, rotation.n, signs, True, val(gradient).dtype).emit(build)
    x = build(aten.view.default, build.contiguous(build.columns(x, width)), [build.size(s) for s in shape(node)])
    replace_all(gradient, x, keep=tuple(u for u in gradient.users if u not in makers))


def _tensor_like(node: Node, other: Node) -> bool:
    value: Any = node.meta.get("val")
    return isinstance(value, torch.Tensor) and same_sizes(value.shape, shape(other))
