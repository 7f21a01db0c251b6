"""Lower products of FP8 operands with one scale a tensor or a row to the FP8 tensor cores.

The largest magnitudes of rows become aten ops in the graph: there Inductor finds them in the kernel that computes the
operand. With one scale a tensor, one cast then writes the codes and, for the product that contracts the other axis,
their transpose from the same read, of several tensors at once where they can wait for each other (``together.py``);
where rows are few, it finds the scale too. With one a row the cast is fused like its scale, unless it is the rows of a
transposed tensor that are quantised. Under the rule ``delayed`` one op makes the scale of what earlier steps knew,
casts, and finds the largest magnitude for the steps to come. Rows that have a scale in each group of tokens are cast by
an op of their own. Codes that do not lie row by row, as the product wants them, are copied.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.fx import Graph, Node

from quartet.kernels import reference
from quartet.kernels.spec import QuantSpec, dtype_name
from quartet.lowering import ir
from quartet.lowering.ir.graph import (
    Builder,
    Traced,
    argument,
    aten,
    hand_over,
    is_backward,
    keep_as,
    maker,
    shape,
    source_of,
    val,
)
from quartet.lowering.ir.operands import TURNED, Product, quantizer_of, readers
from quartet.lowering.ir.ops import fp8 as fp8_ops
from quartet.lowering.ir.ops.grouped import CLEAR_ROWS, PAD_GROUPS, PLACE
from quartet.lowering.ir.views import Quantize, QuantizeGroups
from quartet.lowering.targets.chains import Accepts, Source, accepted
from quartet.lowering.targets.fp8.casts import (
    MOST_ROWS,
    Cast,
    Delayed,
    cast_one_by_rows,
    few,
    largest_magnitude,
    magnitudes_of_rows,
    scales_by,
    share_codes,
)
from quartet.lowering.targets.fp8.delayed import record_instead
from quartet.lowering.targets.fp8.experts import Experts, experts_of
from quartet.lowering.targets.fp8.experts import multiply as multiply_by_experts
from quartet.lowering.targets.fp8.together import cast_together
from quartet.lowering.targets.fp8.weights import Scales, scales_of_weights
from quartet.lowering.targets.fp8_products import multiply, row_major
from quartet.runtime.devices import Target


def supports(target: Target, dtype: torch.dtype, spec: QuantSpec, rotation: int) -> str | None:
    """None when PyTorch's scaled products multiply operands of this format into ``dtype``, else why not."""
    if (reason := target.lacks("fp8 tensor cores")) is not None:
        return reason
    if spec.element not in ir.FLOAT8:
        return f"multiplies FP8 operands, not {spec.element}"
    if spec.blocked:
        return f"multiplies FP8 operands with one scale a row or a tensor, not a scale every {spec.block} elements"
    if spec.block == "row" and dtype is not torch.bfloat16:
        return f"with a scale a row the product is bfloat16, not {dtype_name(dtype)}"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the product is bfloat16, float16 or float32, not {dtype_name(dtype)}"
    return None


def supports_grouped(target: Target, dtype: torch.dtype, spec: QuantSpec, rotation: int) -> str | None:
    """The same of the products of groups and batches."""
    reason = supports(target, dtype, spec, rotation)
    if reason is None and spec.element == "e5m2":
        return "multiplies groups and batches of e4m3, not e5m2"
    if reason is None and dtype is not torch.bfloat16:
        return f"the product of groups and batches is bfloat16, not {dtype_name(dtype)}"
    return reason


def lower(graph: Graph, gemms: list[Node], accepts: Accepts) -> None:
    """Rewrite the chosen products, and the quantise nodes that no other family's product reads."""
    copies: dict[Node, Node] = {}
    traced, quantizers = Traced(), accepted(graph, gemms, accepts)
    experts = experts_of(graph, quantizers, traced)
    known, delayed = scales_of_weights(graph, quantizers), Delayed()
    alone = [quantizer for quantizer in quantizers if quantizer not in experts]
    together = cast_together(alone, gemms, known, traced, delayed)
    for quantizer in alone:
        if quantizer in together:
            continue
        source = Source.of(quantizer)
        if source.spec.block == "tensor" or source.transposed is not None:
            _cast(graph, quantizer, traced, known.get(quantizer), delayed)
        else:
            _quantize(graph, quantizer, traced)
    record_instead(graph, delayed.seen)
    for node in graph.find_nodes(op="call_function", target=QuantizeGroups.op):
        if readers(node) <= set(gemms):
            _cast_groups(graph, node)
    for gemm in gemms:
        _gemm(graph, gemm, copies, experts)


def _cast(graph: Graph, node: Node, traced: Traced, known: Scales | None, delayed: Delayed) -> None:
    """A quantise as its scale, unless that is known, and one cast for the codes and their transpose; by what earlier
    steps knew as one op."""
    cast = Cast.of(node)
    build = Builder(graph, like=node, before=node, backward=is_backward(node))
    if cast.history is not None:
        delayed.cast(build, [cast])
        return
    x, spec, amax, rows = cast.x, cast.spec, cast.amax, list[Node]()
    if known is not None:
        multiplier, scale = known.multiplier, known.scale
    elif spec.block != "tensor" or spec.rule == "absmean":
        multiplier, scale = traced(build, partial(_scales, spec), [x], "scale", spec)
    elif amax is not None:
        multiplier, scale = _scales_of_one(build, amax, spec)
    else:
        x, tokens, *rows = _tokens_of(build, x)
        of_rows = magnitudes_of_rows(build, traced, tokens)
        if of_rows is None or val(of_rows).numel() > MOST_ROWS:
            amax = largest_magnitude(build, traced, tokens if of_rows is None else of_rows)
            multiplier, scale = _scales_of_one(build, amax, spec)
        elif cast.by_words and cast.turned and few(of_rows):
            cast_one_by_rows(build, cast, of_rows)
            return
        else:
            _, ((multiplier, scale),) = scales_by(build, [of_rows], spec)
    if rows:
        both = build(fp8_ops.CAST_ROWS, x, multiplier, spec.element, cast.plain, cast.turned, *rows)
    else:
        both = build(fp8_ops.CAST, x, multiplier, spec.element, cast.plain, cast.turned)
    if spec.block == "tensor" and not rows:
        share_codes(both, scale, spec)
    cast.hand_over(build.item(both, 0), build.item(both, 1), scale)


def _scales_of_one(build: Builder, amax: Node, spec: QuantSpec) -> tuple[Node, Node]:
    made = build(fp8_ops.SCALE, build(aten.reshape.default, amax, [1, 1]), str(spec))
    return build.item(made, 0), build.item(made, 1)


def _tokens_of(build: Builder, x: Node) -> tuple[Node, ...]:
    """What a quantiser with one scale reads, and what has the largest magnitude of it; of padded groups the tokens as
    they lie, those of them that are in a group, and which of them each padded row is."""
    if x.target is not PAD_GROUPS:
        return x, x
    tokens, source = source_of(x), argument(x, "source")
    layout = maker(source)
    if layout is None or not isinstance(shape(tokens)[0], int) or not val(tokens).numel():
        return x, x
    return tokens, build(CLEAR_ROWS, tokens, build.item(layout, PLACE)), source


def _scales(spec: QuantSpec, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(map(ir.STORE, reference.fp32_scale(x, spec)))


def _quantize(graph: Graph, node: Node, traced: Traced) -> None:
    """The reference's aten ops in place of a quantise node."""
    made = Quantize.of(node)
    build = Builder(graph, like=node, before=node, backward=is_backward(node))

    def quantize(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return reference.quantize(t, made.spec, store=ir.STORE)

    hand_over(node, traced(build, quantize, [made.x], "quantize", made.spec))


def _cast_groups(graph: Graph, node: Node) -> None:
    """Scales of the rows in each group, and the cast, as one op."""
    build = Builder(graph, like=node, before=node, backward=is_backward(node))
    made = QuantizeGroups.of(node)
    both = build(fp8_ops.CAST_GROUPS, made.x, str(made.spec), made.ends)
    hand_over(node, [build.item(both, 0), build.item(both, 1)])


def _gemm(graph: Graph, gemm: Node, copies: dict[Node, Node], experts: dict[Node, Experts]) -> None:
    build, product = Builder(graph, like=gemm, before=gemm, backward=is_backward(gemm)), Product.of(gemm)
    a, b = product.operands
    left, made = row_major(build, a.codes, copies), quantizer_of(b.codes)
    if made is not None and made.node in experts:
        out = multiply_by_experts(build, product.kind, left, a.scales, experts[made.node], made.layout == TURNED,
                                  product.dtype)
    else:
        out = multiply(build, product.kind, left, a.scales, row_major(build, b.codes, copies), b.scales, product.dtype)
    gemm.replace_all_uses_with(build.columns(keep_as(out, gemm), shape(gemm)[1]))
