"""Lower GEMMs of FP8 operands with one scale a tensor or a row to the FP8 tensor cores, through ``aten._scaled_mm``.

A scale becomes the aten ops of the reference, in the graph: there Inductor fuses the largest magnitude with what
computes the operand. With one scale a tensor, one cast then writes the codes and, for the product that contracts the
other axis, their transpose from the same read; with one a row the cast is fused like its scale, unless it is the rows
of a transposed tensor that are quantised. The product wants A row-major, B column-major, K and N in multiples of 16:
codes that lie otherwise are copied, and padded with zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from quartet.kernels import reference
from quartet.kernels.spec import QuantSpec, dtype_name
from quartet.lowering import fp8_ops, ir
from quartet.lowering.chains import Accepts, Source, accepted
from quartet.lowering.graph import BACKWARD, Builder, aten, inline, is_backward, keep_as, shape, val
from quartet.lowering.inductor import store
from quartet.runtime import compat
from quartet.runtime.devices import Target

ALIGN = 16
CAPABILITY = (8, 9)  # the first with FP8


def unavailable(device: torch.device | Target) -> str | None:
    """None where a device has FP8 tensor cores that ``_scaled_mm`` drives, else why not."""
    target = Target.of(device)
    if target.type != "cuda":
        return f"FP8 tensor cores are on NVIDIA GPUs, not on {target.type}"
    if target.missing is not None:
        return target.missing
    if target.capability is None:
        return "written for NVIDIA's FP8 formats; this PyTorch is built for ROCm"
    if target.capability < CAPABILITY:
        return "FP8 tensor cores need compute capability 8.9 or more, this device has {}.{}".format(*target.capability)
    return None


def supports(spec: QuantSpec, dtype: torch.dtype) -> str | None:
    """None when ``_scaled_mm`` multiplies operands of this format into ``dtype``, else why not."""
    if spec.element not in ir.FLOAT8:
        return f"multiplies FP8 operands, not {spec.element}"
    if spec.blocked:
        return f"multiplies FP8 operands with one scale a row or a tensor, not a scale every {spec.block} elements"
    if spec.block == "row" and dtype is not torch.bfloat16:
        return f"with a scale a row the product is bfloat16, not {dtype_name(dtype)}"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the product is bfloat16, float16 or float32, not {dtype_name(dtype)}"
    return None


def supports_pair(a: QuantSpec, b: QuantSpec) -> str | None:
    """None when the two formats multiply, else why not."""
    if a.element == b.element == "e5m2":
        return "the tensor cores have no product of e5m2 and e5m2; make one operand e4m3"
    return None


def lower(graph: Graph, gemms: list[Node], accepts: Accepts) -> None:
    """Rewrite the chosen scaled_mm nodes, and the quantise nodes that no other family's product reads."""
    copies: dict[Node, Node] = {}
    for quantizer in accepted(graph, gemms, accepts):
        source = Source.of(quantizer)
        if QuantSpec.parse(source.spec).block == "tensor" or source.transposed is not None:
            _cast(graph, quantizer)
        else:
            _quantize(graph, quantizer)
    for gemm in gemms:
        _gemm(graph, gemm, copies)


def _cast(graph: Graph, node: Node) -> None:
    """A quantise as its scale in aten ops, and one cast for the codes and for their transpose."""
    x, text = node.args[:2]
    assert isinstance(x, Node) and isinstance(text, str)
    spec = QuantSpec.parse(text)
    build = Builder(graph, like=node, before=node, backward=is_backward(node))

    def scales(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(store(value) for value in reference.fp32_scale(inputs[0], spec, *inputs[1:]))

    inputs = [x, *node.args[4:]]
    multiplier, scale = inline(build, compat.trace(scales, list(map(val, inputs))), inputs)  # type: ignore[arg-type]
    items = {item.args[1]: item for item in node.users}
    readers = list(items[0].users) if 0 in items else []
    flipped = [user for user in readers if user.target is aten.permute.default]
    plain = len(flipped) < len(readers)
    both = build(fp8_ops.CAST, x, multiplier, spec.element, plain, bool(flipped))
    if spec.block == "tensor":
        both.meta[fp8_ops.CODES_KEY] = scale.meta[fp8_ops.CODES_KEY] = (text, both.name)
    codes, transposed = build.item(both, 0), build.item(both, 1)
    for user in flipped:
        user.replace_all_uses_with(transposed)
    for index, value in enumerate((codes, scale)):
        if index in items:
            items[index].replace_all_uses_with(value)


def _quantize(graph: Graph, node: Node) -> None:
    """The reference's aten ops in place of a quantise node."""
    x, spec = node.args[:2]
    assert isinstance(x, Node) and isinstance(spec, str)
    build = Builder(graph, like=node, before=node, backward=is_backward(node))

    def quantize(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return reference.quantize(t, QuantSpec.parse(spec), store=store)

    results = inline(build, compat.trace(quantize, [val(x)]), [x])
    for item in list(node.users):
        item.replace_all_uses_with(results[item.args[1]])  # type: ignore[index]


def _gemm(graph: Graph, gemm: Node, copies: dict[Node, Node]) -> None:
    build = Builder(graph, like=gemm, before=gemm, backward=is_backward(gemm))
    a, a_scales, b, b_scales, _, _, dtype = gemm.args
    a, b = row_major(build, a, copies), row_major(build, b, copies)
    out = keep_as(scaled_mm(build, a, a_scales, b, b_scales, dtype), gemm)
    out.meta["quartet_kernel"] = "cublaslt"
    gemm.replace_all_uses_with(build.columns(out, shape(gemm)[1]))


def row_major(build: Builder, codes: Any, copies: dict[Node, Node]) -> Node:
    """``codes`` with rows one after another: as they are, or one copy, shared by what reads it in backward."""
    if [str(s) for s in val(codes).stride()] == [str(shape(codes)[1]), "1"]:
        return codes
    backward = build.meta["partitioner_tag"] == BACKWARD
    copy = copies.get(codes) if backward else None
    if copy is None:
        copy = build(fp8_ops.ROW_MAJOR, codes)
        if backward:
            copies[codes] = copy
    return copy


def scaled_mm(build: Builder, a: Node, a_scales: Any, b: Node, b_scales: Any, dtype: Any,
              aligned: bool = False) -> Node:
    """``A · Bᵀ`` of row-major FP8 codes: ``[M, K] × [N, K] → [M, N rounded up to 16]`` of ``dtype``.

    Scales are fp32, ``[1, 1]`` of a tensor or ``[M, 1]`` and ``[N, 1]`` of rows. With one of each the tensor's is
    repeated for every row. ``aligned``: K is a multiple of 16 whatever it is.
    """
    rows = tuple(shape(s)[0] for s in (a_scales, b_scales))
    if any(not isinstance(r, int) or r != 1 for r in rows):
        a_scales, b_scales = _per_row(build, a, a_scales), _per_row(build, b, b_scales)
        b_scales = build.transpose(build.padded(b_scales, rows=ALIGN))
    cols = 1 if aligned else ALIGN
    a, b = build.padded(a, cols=cols), build.padded(b, rows=ALIGN, cols=cols)
    return build(aten._scaled_mm.default, a, build.transpose(b), a_scales, b_scales, None, None, dtype,
                 True)


def promote(graph: Graph) -> None:
    """Let our products accumulate in fp32 every 128 elements of K, and not in the tensor cores' shorter registers.

    Relative error of a product of exact operands on an H200: 2.1e-3 (K = 4096) to 3.5e-3 (16384) fast, 1.7e-3
    promoted, which is the rounding of a bf16 output; the promoted product takes 10 to 15 % longer.
    """
    for node in graph.find_nodes(op="call_function", target=aten._scaled_mm.default):
        if "quartet_kernel" in node.meta:
            node.update_arg(7, False)


def _per_row(build: Builder, codes: Node, scales: Node) -> Node:
    if str(shape(scales)[0]) == str(shape(codes)[0]):
        return scales
    every = build(aten.expand.default, scales, [build.size(shape(codes)[0]), 1])
    return build(aten.clone.default, every, memory_format=torch.contiguous_format)
