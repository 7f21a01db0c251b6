"""PyTorch's block-scaled matrix products, by cuBLASLt: NVFP4 and MXFP8 on Blackwell, FP8 with fp32 scales on Hopper.

On Hopper (compute capability 9.x alone, CUDA 12.9 or newer) an operand has a scale for 128 elements of a row, or for
128 by 128, and at least one of the two has the former. The quantisers of these stay semantic ops; their scales are
turned, so that those of one block of K lie side by side.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from quartet.kernels.spec import QuantSpec, dtype_name
from quartet.lowering import ir
from quartet.lowering.ir.graph import Builder, is_backward
from quartet.lowering.ir.operands import Operand, Product
from quartet.lowering.targets import fp8_products
from quartet.lowering.targets.blackwell import block_scaled
from quartet.lowering.targets.blackwell.block_scaled_ops import LIBRARY_MM, STRIP
from quartet.lowering.targets.chains import Accepts
from quartet.runtime.devices import Target

CUDA = (12, 9)  # the first whose cuBLASLt has fp32 scales of blocks
OUTPUTS = (torch.bfloat16, torch.float32)


def supports(target: Target, dtype: torch.dtype, spec: QuantSpec, rotation: int) -> str | None:
    """None when cuBLASLt multiplies operands of this format into ``dtype``, else why not."""
    reason = target.lacks("fp8 block scales")
    if target.capability is None:
        return reason
    if block_scaled.kind_of(spec) in ("nvf4", "mxf8"):
        return block_scaled.supports(target, dtype, spec, rotation)
    if not _fp8_blocks(spec):
        return f"multiplies NVFP4, MXFP8, and FP8 with a scale every 128 elements, not {spec}"
    if reason is not None:
        return reason
    if not target.pretended and _version(torch.version.cuda) < CUDA:
        return f"fp32 scales of blocks need PyTorch built for CUDA 12.9 or newer, this one is for {torch.version.cuda}"
    return None if dtype in OUTPUTS else f"the product is bfloat16 or float32, not {dtype_name(dtype)}"


def supports_pair(a: QuantSpec, b: QuantSpec) -> str | None:
    """None when the two formats multiply, each of them supported, else why not."""
    if not (_fp8_blocks(a) and _fp8_blocks(b)):
        return block_scaled.supports_pair(a, b)
    if a.tile and b.tile:
        return "cuBLASLt has no product of 128x128 and 128x128; give one operand a scale every 128 elements of a row"
    return fp8_products.supports_pair(a, b)


def lower(graph: Graph, gemms: list[Node], accepts: Accepts) -> None:
    """Rewrite the chosen scaled_mm nodes, and the quantisers of NVFP4."""
    blocks = [gemm for gemm in gemms if _fp8_blocks(Product.of(gemm).a.spec)]
    block_scaled.lower_library(graph, [gemm for gemm in gemms if gemm not in blocks], accepts)
    for gemm in blocks:
        _blocks(graph, gemm)


def _blocks(graph: Graph, gemm: Node) -> None:
    build = Builder(graph, like=gemm, before=gemm, backward=is_backward(gemm))
    product = Product.of(gemm)
    left, right = _scales(build, product.a, rows=1), _scales(build, product.b, rows=fp8_products.ALIGN)
    b = build.padded(product.b.codes, rows=fp8_products.ALIGN)
    formats = [_format(operand.spec) for operand in product.operands]
    out = build(LIBRARY_MM, product.a.codes, left, b, right, *formats, product.dtype)
    block_scaled.put(build, gemm, out)


def _scales(build: Builder, operand: Operand, rows: int) -> Node:
    """Scales in the layout of ``block_scaled_ops``, of an operand padded to a multiple of ``rows``."""
    if operand.spec.tile:
        return build.padded(operand.scales, cols=STRIP)
    return build.contiguous(build.transpose(build.padded(operand.scales, rows=rows)))


def _format(spec: QuantSpec) -> str:
    return "128x128" if spec.tile else "1x128"


def _fp8_blocks(spec: QuantSpec) -> bool:
    return spec.element in ir.FLOAT8 and spec.block == 128 and spec.scale == "fp32"


def _version(text: str | None) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")[:2])) if text else (0,)
