"""Lower the quantised IR to the fused CPU kernels and plain matmuls.

A product becomes one of the dequantised operands in the model's dtype. An operand quantised in the same
direction arrives dequantised from its quantiser; one that was kept for backward is read from its codes.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from quartet.kernels.cpu import ops as kernels
from quartet.kernels.spec import QuantSpec
from quartet.lowering.ir.graph import Builder, hand_over, is_backward, keep_as, val
from quartet.lowering.ir.operands import Product
from quartet.lowering.ir.ops.fused import DEQUANTIZE
from quartet.lowering.ir.products import multiply
from quartet.lowering.targets.chains import (
    Accepts,
    Source,
    accepted,
    direct,
    is_stored,
    operand_dtype,
)
from quartet.lowering.targets.cpu import ops as cpu_ops
from quartet.lowering.targets.epilogues import Epilogue, finish
from quartet.runtime.devices import Target


def supports(target: Target, dtype: torch.dtype, spec: QuantSpec, rotation: int) -> str | None:
    """None when the fused CPU kernels take the chain and are built, else why not."""
    if target.type != "cpu":
        return f"runs on a CPU, not on {target.type}"
    return kernels.supports(spec, rotation, dtype) or kernels.unavailable()


def lower(graph: Graph, gemms: list[Node], accepts: Accepts) -> None:
    """Rewrite the chosen products and the chains around them.

    Args:
        gemms: products whose quantisers these kernels take.
        accepts: (quantiser, Hadamard size, dtype) → whether the kernels take that chain.
    """
    wanted: dict[Node, torch.dtype] = {}
    for gemm in gemms:
        for operand in Product.of(gemm).operands:
            quantizer = direct(operand.codes, gemm)
            if quantizer is not None:
                wanted[quantizer] = operand_dtype(gemm)
    chosen = set(gemms)
    fused = {node: _quantizer(graph, node, wanted.get(node), chosen) for node in accepted(graph, gemms, accepts)}
    for gemm in gemms:
        _gemm(graph, gemm, fused)


def _quantizer(graph: Graph, node: Node, values: torch.dtype | None, gemms: set[Node]) -> list[Node]:
    """Replace hadamard → quantize by one fused op; returns its four results."""
    source = Source.of(node)
    build = Builder(graph, like=node, before=node, backward=is_backward(node))
    tail = (*source.tail, is_stored(node, gemms), values)
    stored = source.stored
    if stored is not None:
        op = build(cpu_ops.REQUANTIZE, *stored.stored, *tail)
    else:
        op = build(cpu_ops.QUANTIZE, source.x, *tail, *source.reuse)
    results = [build.item(op, i) for i in range(4)]
    hand_over(node, results)
    return results


def _gemm(graph: Graph, gemm: Node, fused: dict[Node, list[Node]]) -> None:
    build = Builder(graph, like=gemm, before=gemm, backward=is_backward(gemm))
    results = {codes: items for items in fused.values() for codes in items[:1]}
    product, operands, dtype = Product.of(gemm), [], operand_dtype(gemm)
    for operand in product.operands:
        made = results.get(operand.codes)
        values = made[3] if made is not None and direct(operand.codes, gemm) is not None else None
        if values is not None and val(values).dim() == 2 and val(values).dtype == dtype:
            operands.append(values)
        else:
            operands.append(build(DEQUANTIZE, *operand.stored, dtype))
    out = keep_as(multiply(build, product.kind, *operands), gemm)
    finish(build, gemm, out, product.gain, Epilogue.of(gemm))
