"""Lower the quantised IR to the Triton quantisers and FP8 tensor cores, or to plain matmuls where there are none.

An MXFP4 operand is exact as E4M3 with a power-of-two scale a row, so the FP8 product of two of them is the MXFP4
product. What is quantised and multiplied in the same direction arrives folded from its quantiser; what was kept for
backward is folded from its codes. A gradient that dgrad and wgrad quantise along different axes is read once.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from quartet.kernels.spec import QuantSpec, dtype_name
from quartet.lowering.ir import two_level
from quartet.lowering.ir.graph import Builder, aten, hand_over, is_backward, keep_as, results, shape, val
from quartet.lowering.ir.operands import Operand, Product
from quartet.lowering.ir.ops import fused as cuda_ops
from quartet.lowering.ir.products import multiply as multiply_plain
from quartet.lowering.targets.chains import (
    Accepts,
    Source,
    accepted,
    both_axes,
    direct,
    is_stored,
    operand_dtype,
    quantize_both,
    ready,
)
from quartet.lowering.targets.epilogues import Epilogue, finish
from quartet.lowering.targets.fp8_products import multiply
from quartet.lowering.targets.triton_quantizers import supports
from quartet.runtime.devices import Target

Folded = tuple[Node, Node]  # E4M3 values and row scales


def supports_fold(target: Target, dtype: torch.dtype, spec: QuantSpec, rotation: int) -> str | None:
    """None when the product runs on FP8 tensor cores after an exact fold, else why not."""
    reason = target.lacks("fp8 tensor cores") or supports(target, dtype, spec, rotation)
    if reason is None and spec.scale != "e8m0":
        return f"'{spec}' does not fold to E4M3 with a power-of-two scale a row; dequantised it is exact in bfloat16"
    if reason is None and dtype is not torch.bfloat16:
        return f"the FP8 product with a scale a row is bfloat16, not {dtype_name(dtype)}"
    return reason


class Lowering:
    """One graph's rewrite.

    Args:
        fold: multiply E4M3 operands on FP8 tensor cores, else dequantised ones with ``mm``.
    """

    def __init__(self, graph: Graph, gemms: list[Node], accepts: Accepts, fold: bool) -> None:
        self.graph, self.gemms, self.fold = graph, set(gemms), fold
        self.wanted = {direct(operand.codes, gemm): _ends(product) for gemm in gemms
                       for product in [Product.of(gemm)] for operand in product.operands}
        self.operands: dict[tuple[Node, bool], Folded] = {}  # by codes, and whether backward reads them
        quantizers = accepted(graph, gemms, accepts)
        alone = [node for node in quantizers if node in self.wanted and not is_stored(node, self.gemms)]
        pairs = both_axes(alone) if fold else []
        for rows, columns in pairs:
            self._quantize_both(rows, columns)
        paired = {node for pair in pairs for node in pair}
        for node in quantizers:
            if node not in paired:
                self._quantize(node)
        for gemm in gemms:
            self._gemm(gemm)

    def _quantize_both(self, rows: Node, columns: Node) -> None:
        build, op = quantize_both(self.graph, cuda_ops.QUANTIZE_BOTH, rows, columns, self.wanted[columns])
        for index, node in enumerate((rows, columns)):
            folded = build.item(op, 2 * index), build.item(op, 2 * index + 1)
            self.operands[results(node)[0], is_backward(node)] = folded

    def _quantize(self, node: Node) -> None:
        """Replace hadamard → quantize by one fused op."""
        build = Builder(self.graph, like=node, before=node, backward=is_backward(node))
        source = ready(build, Source.of(node))
        folded = self.fold and node in self.wanted
        tail = (*source.chain, not folded or is_stored(node, self.gemms), folded)
        stored, matrices = source.stack or (source.stored, 1)
        ends = self.wanted[node] if folded else None
        if stored is not None and source.encode is None and stored.spec.gain == 1.0:
            op = build(cuda_ops.REQUANTIZE, *stored.stored, *tail, build.size(matrices), ends)
        else:
            op = build(cuda_ops.QUANTIZE, source.x, *tail, *source.reuse, ends)
        made = [build.item(op, i) for i in range(5)]
        if folded:
            self.operands[made[0], is_backward(node)] = made[3], made[4]
        hand_over(node, made)

    def _gemm(self, gemm: Node) -> None:
        build = Builder(self.graph, like=gemm, before=gemm, backward=is_backward(gemm))
        product = Product.of(gemm)
        if self.fold:
            left, right = (self._operand(build, gemm, product, operand) for operand in product.operands)
            out = multiply(build, product.kind, *left, *right, val(gemm).dtype, aligned=True)
        else:
            values = [build(cuda_ops.DEQUANTIZE, *operand.stored, operand_dtype(gemm)) for operand in product.operands]
            out = multiply_plain(build, product.kind, *values)
        out = keep_as(out, gemm)
        for operand in product.operands:
            if operand.amax is not None:
                wide = build.cast(out, torch.float32)
                out = build(aten.mul.Tensor, wide, two_level.decode(build, operand.amax, operand.spec))
        follows = Epilogue.of(gemm)
        if follows is not None and not follows.takes(shape(out)[1]):
            follows = None
        finish(build, gemm, out, product.gain, follows)

    def _operand(self, build: Builder, gemm: Node, product: Product, operand: Operand) -> Folded:
        """A product's operand, folded at most once in each direction."""
        key = operand.codes, is_backward(gemm)
        if key in self.operands and direct(operand.codes, gemm) is not None:
            return self.operands[key]
        both = build(cuda_ops.FOLD, *operand.stored, _ends(product))
        folded = build.item(both, 0), build.item(both, 1)
        if key[1]:
            self.operands[key] = folded
        return folded


def _ends(product: Product) -> Node | None:
    """Where groups end along what a product contracts, if it contracts the tokens of groups."""
    return product.kind.ends if product.kind.over_tokens else None


def lower_fold(graph: Graph, gemms: list[Node], accepts: Accepts) -> None:
    """Rewrite the chosen products to those of FP8 tensor cores, and the chains around them."""
    Lowering(graph, gemms, accepts, fold=True)


def lower_plain(graph: Graph, gemms: list[Node], accepts: Accepts) -> None:
    """Rewrite the chosen products to those of the model's dtype, and the chains around them."""
    Lowering(graph, gemms, accepts, fold=False)
