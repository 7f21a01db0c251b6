"""Lower MXFP4 to Blackwell's block-scaled tensor cores: kernels generated with CUTLASS, or Triton's.

Operands stay as they are quantised: packed codes and the scales of their blocks, in the layout that the tensor cores
read. Both gains of a product are the factor that the kernel multiplies its result by.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from quartet.kernels.cutlass.configuration import N_MULTIPLE, arch_of
from quartet.kernels.cutlass.gemm import OUTPUT_OF
from quartet.kernels.spec import QuantSpec, dtype_name
from quartet.lowering import ir
from quartet.lowering.ir.graph import Builder, aten, hand_over, is_backward, keep_as, maker, results, shape, val
from quartet.lowering.ir.operands import SCALED, Operand, Product
from quartet.lowering.ir.views import Dequantize, Quantize
from quartet.lowering.targets import triton_quantizers
from quartet.lowering.targets.blackwell import block_scaled_ops
from quartet.lowering.targets.blackwell import ops as blackwell_ops
from quartet.lowering.targets.chains import (
    Accepts,
    Source,
    accepted,
    both_axes,
    is_stored,
    quantize_both,
    ready,
)
from quartet.lowering.targets.epilogues import Epilogue, finish
from quartet.runtime.compat import OpOverload
from quartet.runtime.devices import Target


def arch(target: Target) -> str | None:
    """What kernels for a target are compiled for, or None where it has no FP4 tensor cores."""
    return None if target.capability is None else arch_of(target.capability)


def supports_cutlass(target: Target, dtype: torch.dtype, spec: QuantSpec, rotation: int) -> str | None:
    """:func:`supports`, and None only where the kernels can be built."""
    return supports(target, dtype, spec, rotation) or unbuildable(target, "mxf4", dtype)


def unbuildable(target: Target, kind: str, dtype: torch.dtype) -> str | None:
    """None where all CUTLASS kernels of a kind and output can be built or are in the cache, or nothing will run, else
    why not."""
    if target.pretended:
        return None
    from quartet.kernels.cutlass.build import unready

    return unready(str(arch(target)), kind, OUTPUT_OF[dtype])


def supports(target: Target, dtype: torch.dtype, spec: QuantSpec, rotation: int) -> str | None:
    """None when the product runs on FP4 tensor cores, else why not."""
    reason = target.lacks("block-scaled tensor cores") or triton_quantizers.supports(target, dtype, spec, rotation)
    if reason is None and spec.block != 32:
        return f"the FP4 tensor cores scale blocks of 32, not of {spec.block}"
    if reason is None and dtype not in OUTPUT_OF:
        return f"the product is {', '.join(map(dtype_name, OUTPUT_OF))}, not {dtype_name(dtype)}"
    return reason


def lower_cutlass(graph: Graph, gemms: list[Node], accepts: Accepts) -> None:
    """Rewrite the chosen scaled_mm nodes to CUTLASS kernels, and the chains around them."""
    _lower(graph, gemms, accepts, block_scaled_ops.MM)


def lower_dot(graph: Graph, gemms: list[Node], accepts: Accepts) -> None:
    """Rewrite the chosen scaled_mm nodes to Triton's dot_scaled, and the chains around them."""
    _lower(graph, gemms, accepts, blackwell_ops.DOT)


def _lower(graph: Graph, gemms: list[Node], accepts: Accepts, product: OpOverload) -> None:
    quantize(graph, gemms, accepted(graph, gemms, accepts))
    for gemm in gemms:
        _gemm(graph, gemm, product)
    unswizzle(graph)


def quantize(graph: Graph, gemms: list[Node], quantizers: list[Node]) -> None:
    """Replace the quantisers of products, and the chains before them, by kernels that write swizzled scales."""
    chosen = set(gemms)
    pairs = both_axes([node for node in quantizers if not is_stored(node, chosen)])
    for rows, columns in pairs:
        build, op = quantize_both(graph, blackwell_ops.QUANTIZE_BOTH, rows, columns)
        _hand_over(rows, [build.item(op, 0), build.item(op, 1)])
        _hand_over(columns, [build.item(op, 2), build.item(op, 3)])
    paired = {node for pair in pairs for node in pair}
    for node in quantizers:
        if node not in paired:
            _hand_over(node, _quantize(graph, node))


def use_integers(graph: Graph) -> None:
    """Let the quantisers round in integer arithmetic, as on every other device, and not by the hardware's conversions,
    whose stochastic one uses its random bits differently."""
    for op in blackwell_ops.QUANTIZERS:
        for node in graph.find_nodes(op="call_function", target=op):
            node.update_kwarg("hardware", False)


def _quantize(graph: Graph, node: Node) -> list[Node]:
    """One fused op for hadamard → quantize, from packed codes where the tensor is a saved one's transpose."""
    build = Builder(graph, like=node, before=node, backward=is_backward(node))
    source = ready(build, Source.of(node))
    stored = source.stored if source.encode is None else None
    if stored is not None and stored.spec.gain == 1.0 and is_ours(stored.scales):
        op = build(blackwell_ops.REQUANTIZE, *stored.stored, *source.chain)
        return [build.item(op, 0), build.item(op, 1)]
    op = build(blackwell_ops.QUANTIZE, source.x, *source.chain, *source.reuse)
    return [build.item(op, i) for i in range(3)]


def _hand_over(quantizer: Node, made: list[Node]) -> None:
    """Codes, scales and mask of a quantise are ``made`` from now on. The scales lie in another order for products and
    for what :func:`unswizzle` finds; whatever else reads them, such as a collective, gets them row by row."""
    scales = results(quantizer).get(1)
    others = [] if scales is None else [user for user in scales.users if user.target not in (*SCALED, ir.DEQUANTIZE)]
    if scales is not None and others:
        build = Builder(quantizer.graph, like=quantizer, before=quantizer, backward=is_backward(quantizer))
        plain = _row_by_row(build, made[0], made[1], Quantize.of(quantizer).spec)
        for user in others:
            user.replace_input_with(scales, plain)
    hand_over(quantizer, made)


def _gemm(graph: Graph, gemm: Node, product: OpOverload) -> None:
    build = Builder(graph, like=gemm, before=gemm, backward=is_backward(gemm))
    read = Product.of(gemm)
    a, b, a_scales, b_scales = read.a.codes, read.b.codes, swizzled(build, read.a), swizzled(build, read.b)
    if product is block_scaled_ops.MM:
        b = build.padded(b, rows=N_MULTIPLE[OUTPUT_OF[val(gemm).dtype]])
        made = build(product, a, a_scales, b, b_scales, "mxf4", read.gain, read.dtype)
    else:
        made = build(product, a, a_scales, b, b_scales, read.gain, read.dtype)
    out = keep_as(made, gemm)
    follows = Epilogue.of(gemm)
    if follows is not None and not follows.takes(shape(out)[1]):
        follows = None
    finish(build, gemm, out, 1.0, follows)


def is_ours(scales: Node) -> bool:
    """Whether these are swizzled scales of a fused quantiser."""
    made_by = maker(scales)
    return made_by is not None and made_by.target in blackwell_ops.QUANTIZERS


def swizzled(build: Builder, operand: Operand) -> Node:
    """The scales of an operand in the layout of the tensor cores."""
    if is_ours(operand.scales):
        return operand.scales
    return build(block_scaled_ops.SWIZZLE, operand.scales, int(operand.spec.block) if operand.spec.tile else 1)


def unswizzle(graph: Graph) -> None:
    """Give what else reads our codes, such as a backward product of another recipe, their scales row by row."""
    for node in graph.find_nodes(op="call_function", target=ir.DEQUANTIZE):
        read = Dequantize.of(node)
        if is_ours(read.scales) and node.users:
            build = Builder(graph, like=node, before=node, backward=is_backward(node))
            node.replace_input_with(read.scales, _row_by_row(build, read.codes, read.scales, read.spec))


def _row_by_row(build: Builder, codes: Node, scales: Node, spec: QuantSpec) -> Node:
    """Swizzled scales in the shape of :func:`quartet.lowering.ir.scale_layout`."""
    rows, half = shape(codes)
    plain = build(blackwell_ops.UNSWIZZLE, scales, build.size(rows), build.size(half * 2 // spec.block))
    if spec.tile:
        plain = build(aten.slice.Tensor, plain, 0, 0, build.size(rows), spec.block)
    return build(aten.view.dtype, plain, torch.float8_e4m3fn) if spec.two_level else plain
