"""Lower the quantised IR to the fused CPU kernels and plain matmuls.

scaled_mm becomes ``mm`` of the dequantised operands in the model's dtype. An operand quantised in the same
direction arrives dequantised from its quantiser; one that was kept for backward is read from its codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from quartet.kernels.spec import QuantSpec
from quartet.lowering import cpu_ops, ir
from quartet.lowering.graph import RECOMPUTED, Builder, aten, is_backward, keep_as, shape, val


def lower(graph: torch.fx.Graph, gemms: list[Node], accepts: Callable[[QuantSpec, int, torch.dtype], bool]) -> None:
    """Rewrite the chosen scaled_mm nodes and the chains around them.

    Args:
        gemms: scaled_mm nodes whose quantisers these kernels take.
        accepts: (quantiser, Hadamard size, dtype) → whether the kernels take that chain.
    """
    wanted: dict[Node, torch.dtype] = {}
    for gemm in gemms:
        for codes in (gemm.args[0], gemm.args[2]):
            quantizer = _direct(codes, gemm)
            if quantizer is not None:
                wanted[quantizer] = operand_dtype(gemm)
    chosen = set(gemms)
    fused = {node: _quantizer(graph, node, wanted.get(node), chosen)
             for node in graph.find_nodes(op="call_function", target=ir.QUANTIZE) if _acceptable(node, accepts)}
    for gemm in gemms:
        _gemm(graph, gemm, fused)


def operand_dtype(gemm: Node) -> torch.dtype:
    """dtype of the dequantised operands: the model's, but fp32 for fp16, whose range is shorter than E8M0's."""
    dtype = val(gemm).dtype
    return torch.float32 if dtype is torch.float16 else dtype


def _acceptable(node: Node, accepts: Callable[[QuantSpec, int, torch.dtype], bool]) -> bool:
    x = node.args[0]
    assert isinstance(x, Node)
    rotation = x.args[1] if x.target is ir.HADAMARD else 0
    source = x.args[0] if x.target is ir.HADAMARD else x
    return accepts(QuantSpec.parse(node.args[1]), rotation, val(source).dtype)  # type: ignore[arg-type]


def _direct(codes: Any, gemm: Node) -> Node | None:
    """The quantiser that can hand its dequantised values straight to ``gemm``; None when it must read codes."""
    quantizer = codes.args[0]
    again = gemm.meta.get("recompute") in RECOMPUTED and quantizer.meta.get("recompute") not in RECOMPUTED
    if is_backward(quantizer) != is_backward(gemm) or again:
        return None
    return quantizer


def _quantizer(graph: torch.fx.Graph, node: Node, values: torch.dtype | None, gemms: set[Node]) -> list[Node]:
    """Replace hadamard → quantize by one fused op; returns its four results."""
    x, spec, seed, site = node.args
    assert isinstance(x, Node)
    rotation, signs = 0, None
    if x.target is ir.HADAMARD:
        x, rotation, signs = x.args[0], x.args[1], x.args[2]  # type: ignore[assignment]
    assert isinstance(x, Node)
    build = Builder(graph, like=node, before=node, backward=is_backward(node))
    packed = any(_direct(item, user) is None if user in gemms else True for item in node.users for user in item.users)
    tail = (rotation, signs, spec, seed, site, packed, values)
    stored = _stored(x)
    if stored is not None:
        op = build(cpu_ops.REQUANTIZE, stored.args[0], stored.args[1], stored.args[2], *tail)
    else:
        op = build(cpu_ops.QUANTIZE, x, *tail)
    results = [build.item(op, i) for i in range(4)]
    for item in list(node.users):
        item.replace_all_uses_with(results[item.args[1]])  # type: ignore[index]
    return results


def _stored(x: Node) -> Node | None:
    """The dequantize behind a transpose: its packed codes can be read directly."""
    source = x.args[0] if x.target is aten.permute.default else None
    if isinstance(source, Node) and source.target is ir.DEQUANTIZE and val(source.args[0]).dtype is torch.uint8:  # type: ignore[arg-type]
        return source
    return None


def _gemm(graph: torch.fx.Graph, gemm: Node, fused: dict[Node, list[Node]]) -> None:
    build = Builder(graph, like=gemm, before=gemm, backward=is_backward(gemm))
    results = {codes: items for items in fused.values() for codes in items[:1]}
    a, a_scales, b, b_scales, a_spec, b_spec, out_dtype = gemm.args
    operands, dtype = [], operand_dtype(gemm)
    for codes, scales, spec in ((a, a_scales, a_spec), (b, b_scales, b_spec)):
        made = results.get(codes)  # type: ignore[arg-type]
        values = made[3] if made is not None and _direct(codes, gemm) is not None else None
        if values is not None and val(values).dim() == 2 and val(values).dtype == dtype:
            operands.append(values)
        else:
            operands.append(build(cpu_ops.DEQUANTIZE, codes, scales, spec, dtype))
    out = keep_as(build(aten.mm.default, operands[0], build.transpose(operands[1])), gemm)
    gain = QuantSpec.parse(a_spec).gain * QuantSpec.parse(b_spec).gain  # type: ignore[arg-type]
    out.meta["quartet_kernel"] = "cpp"
    chain = _epilogue(gemm)
    if chain is None:
        out = build(aten.mul.Tensor, out, gain) if gain != 1.0 else out
        gemm.replace_all_uses_with(build.cast(out, val(gemm).dtype))
        return
    mask, unrotate, last = chain
    at = Builder(graph, like=last, before=last, backward=is_backward(last))
    cols = shape(last)[1]
    rotation, signs = (unrotate.args[1], unrotate.args[2]) if unrotate else (0, None)
    out_dtype = unrotate.args[4] if unrotate else out_dtype
    last.replace_all_uses_with(at(cpu_ops.UNROTATE, out, mask, rotation, signs, gain, at.size(cols), out_dtype))


def _epilogue(gemm: Node) -> tuple[Node | None, Node | None, Node] | None:
    """apply_mask and inverse hadamard and slice after a GEMM, as far as each is the only reader of the last."""
    mask = unrotate = None
    last = gemm
    user = _only_user(last)
    if user is not None and user.target is ir.APPLY_MASK:
        mask, last = user.args[1], user
        user = _only_user(last)
    if user is not None and user.target is ir.HADAMARD and user.args[3]:
        unrotate, last = user, user
        user = _only_user(last)
    if last is not gemm and user is not None and user.target is aten.slice.Tensor and user.args[1:3] == (1, 0):
        last = user
    if last is gemm:
        return None
    width = val(gemm).shape[1]
    if mask is not None and (not isinstance(width, int) or val(mask).shape[1] * 8 != width):  # type: ignore[arg-type]
        return None
    return mask, unrotate, last  # type: ignore[return-value]


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
