"""Lower NVFP4 and MXFP8 to Blackwell's block-scaled tensor cores.

Operands stay as they are quantised. The quantisers of NVFP4 are Triton's, which write the scales as the tensor cores
read them. Those of MXFP8 stay semantic ops, which Inductor fuses with what computes their tensors; so does the swizzle
of their scales. The factors of both tensors, of two-level scales, become one number on the device by which the kernel
multiplies: their product has to be in the range of fp32, where the reference multiplies by one after the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from quartet.kernels.cutlass.configuration import N_MULTIPLE
from quartet.kernels.cutlass.gemm import OUTPUT_OF
from quartet.kernels.spec import QuantSpec, dtype_name
from quartet.lowering.ir import two_level
from quartet.lowering.ir.graph import Builder, aten, is_backward, keep_as, shape, val
from quartet.lowering.ir.operands import Operand, Product
from quartet.lowering.targets.blackwell import lower as blackwell
from quartet.lowering.targets.blackwell.block_scaled_ops import LIBRARY_MM, MM
from quartet.lowering.targets.chains import Accepts, accepted
from quartet.lowering.targets.fp8_products import ALIGN
from quartet.runtime.devices import Target

KINDS = {("e2m1", 32, "e8m0"): "mxf4", ("e2m1", 16, "e4m3"): "nvf4", ("e4m3", 32, "e8m0"): "mxf8"}
NAMES = {"mxf4": "MXFP4", "nvf4": "NVFP4", "mxf8": "MXFP8"}
K_BYTES = 16  # rows of codes are whole units of 16 bytes


def kind_of(spec: QuantSpec) -> str | None:
    """The tensor cores' name of an operand's format; None where it is none of theirs."""
    return KINDS.get((spec.element, spec.block, spec.scale))


def supports(target: Target, dtype: torch.dtype, spec: QuantSpec, rotation: int) -> str | None:
    """None when block-scaled tensor cores multiply operands of NVFP4 or MXFP8 into ``dtype``, else why not."""
    reason = target.lacks("block-scaled tensor cores")
    if reason is not None and target.type == "cuda" and dtype is torch.bfloat16:
        return f"{reason}; what is dequantised instead is exact in bfloat16"
    if reason is None and dtype not in OUTPUT_OF:
        return f"the product is {', '.join(map(dtype_name, OUTPUT_OF))}, not {dtype_name(dtype)}"
    return reason


def supports_cutlass(target: Target, dtype: torch.dtype, spec: QuantSpec, rotation: int) -> str | None:
    """None when a kernel generated with CUTLASS takes the operand and can be built, else why not."""
    kind = kind_of(spec)
    if kind not in ("nvf4", "mxf8"):
        return blackwell.supports_cutlass(target, dtype, spec, rotation)
    return supports(target, dtype, spec, rotation) or blackwell.unbuildable(target, kind, dtype)


def supports_pair(a: QuantSpec, b: QuantSpec) -> str | None:
    """None when the two formats multiply, each of them supported, else why not."""
    names = [NAMES.get(kind_of(spec) or "", str(spec)) for spec in (a, b)]
    return None if names[0] == names[1] else f"both operands have to be of one format, not {names[0]} and {names[1]}"


def lower_cutlass(graph: Graph, gemms: list[Node], accepts: Accepts) -> None:
    """Rewrite the chosen scaled_mm nodes to CUTLASS kernels, and of MXFP4 the chains around them."""
    fp4 = [gemm for gemm in gemms if kind_of(Product.of(gemm).a.spec) == "mxf4"]
    if fp4:
        blackwell.lower_cutlass(graph, fp4, accepts)
    operands = Operands(graph, [gemm for gemm in gemms if gemm not in fp4], accepts)
    for gemm in operands.gemms:
        build, kind, *given, alpha = operands.of(gemm, N_MULTIPLE[OUTPUT_OF[val(gemm).dtype]])
        put(build, gemm, build(MM, *given, kind, 1.0, Product.of(gemm).dtype, alpha))
    blackwell.unswizzle(graph)


def autotune(graph: Graph) -> None:
    """Let the kernels generated with CUTLASS be measured when a product is first computed, and the fastest be taken."""
    for node in graph.find_nodes(op="call_function", target=MM):
        node.update_kwarg("tune", True)


def lower_library(graph: Graph, gemms: list[Node], accepts: Accepts) -> None:
    """Rewrite scaled_mm nodes of NVFP4 or MXFP8 to cuBLASLt's products."""
    operands = Operands(graph, gemms, accepts)
    for gemm in gemms:
        build, kind, *given, alpha = operands.of(gemm, ALIGN)
        put(build, gemm, build(LIBRARY_MM, *given, kind, kind, Product.of(gemm).dtype, alpha))
    blackwell.unswizzle(graph)


def put(build: Builder, gemm: Node, product: Node) -> None:
    """Let the first columns of ``product`` stand for ``gemm``."""
    gemm.replace_all_uses_with(build.columns(keep_as(product, gemm), shape(gemm)[1]))


class Operands:
    """What products read, made once for those that read the same and are computed together.

    Args:
        accepts: which chains the Triton quantisers take; they are replaced at once.
    """

    def __init__(self, graph: Graph, gemms: list[Node], accepts: Accepts) -> None:
        self.graph, self.gemms = graph, gemms
        self.made: dict[Any, Node] = {}
        if gemms:
            blackwell.quantize(graph, gemms, accepted(graph, gemms, accepts))

    def of(self, gemm: Node, n_multiple: int) -> tuple[Any, ...]:
        """A builder before ``gemm``, the kind of its operands, both codes with their swizzled scales, and alpha."""
        build = Builder(self.graph, like=gemm, before=gemm, backward=is_backward(gemm))
        product = Product.of(gemm)
        a, b = product.a.codes, product.b.codes
        a, b = build.padded(a, cols=_per_unit(a)), build.padded(b, rows=n_multiple, cols=_per_unit(b))
        scales = [self._swizzled(build, operand) for operand in product.operands]
        factors = [self._factor(build, operand.amax, operand.spec)
                   for operand in product.operands if operand.amax is not None]
        alpha = build(aten.mul.Tensor, *factors) if len(factors) == 2 else None
        return build, kind_of(product.a.spec), a, scales[0], b, scales[1], alpha

    def _swizzled(self, build: Builder, operand: Operand) -> Node:
        key = "scales", operand.scales, operand.spec.tile
        return self._once(build, key, lambda: blackwell.swizzled(build, operand))

    def _factor(self, build: Builder, amax: Node, spec: QuantSpec) -> Node:
        return self._once(build, ("factor", amax, spec.rule), lambda: two_level.decode(build, amax, spec))

    def _once(self, build: Builder, key: tuple[Any, ...], make: Any) -> Node:
        key = (*key, build.meta["partitioner_tag"], str(build.meta.get("recompute")))
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]


def _per_unit(codes: Node) -> int:
    return K_BYTES // val(codes).element_size()
