"""Lower GEMMs of INT8 operands with one scale a tensor or a row to integer arithmetic, through ``aten._int_mm``.

The product of the codes is exact in int32, and becomes fp32 by one rounding; then come the scales, A's first, as in the
reference, whose sums in fp32 are exact below 2^24. The quantisers stay semantic ops. A product wants both operands
row-major, K and N in multiples of 16 (8 by PyTorch; cuBLASLt's kernels are for 16 bytes), and more than 16 rows of A.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from quartet.kernels.spec import QuantSpec
from quartet.lowering.ir.graph import Builder, aten, is_backward, keep_as, shape, val
from quartet.lowering.ir.operands import Product
from quartet.lowering.targets.chains import Accepts
from quartet.lowering.targets.fp8_products import row_major
from quartet.lowering.targets.int8.ops import ALIGN, FEWEST_ROWS, INT_MM, LONGEST
from quartet.runtime.devices import Target

CODES = ("int8", "ternary")


def supports(target: Target, dtype: torch.dtype, spec: QuantSpec, rotation: int) -> str | None:
    """None when operands of this format are multiplied as integers, else why not."""
    reason = target.lacks("int8 tensor cores")
    if reason is None and spec.element not in CODES:
        return f"multiplies INT8 operands, not {spec.element}"
    if reason is None and spec.blocked:
        return f"multiplies INT8 operands with one scale a row or a tensor, not a scale every {spec.block} elements"
    return reason


def lower(graph: Graph, gemms: list[Node], accepts: Accepts) -> None:
    """Rewrite the chosen scaled_mm nodes; their quantisers stay."""
    copies: dict[Node, Node] = {}
    for gemm in gemms:
        _gemm(graph, gemm, copies)


def _gemm(graph: Graph, gemm: Node, copies: dict[Node, Node]) -> None:
    build = Builder(graph, like=gemm, before=gemm, backward=is_backward(gemm))
    product = Product.of(gemm)
    a, b = (row_major(build, operand.codes, copies) for operand in product.operands)
    (m, k), n = shape(a), shape(b)[0]
    a, b = build.padded(a, cols=ALIGN), build.padded(b, rows=ALIGN, cols=ALIGN)
    known = isinstance(m, int) and isinstance(k, int) and m >= FEWEST_ROWS and k <= LONGEST
    made = build(aten._int_mm.default, a, build.transpose(b)) if known else build(INT_MM, a, b)
    out = keep_as(made, gemm)
    out = build.cast(build.columns(out, n), torch.float32)
    out = build(aten.mul.Tensor, build(aten.mul.Tensor, out, product.a.scales), build.transpose(product.b.scales))
    gemm.replace_all_uses_with(build.cast(out, val(gemm).dtype))
