"""Put quantisers on the operands of the rotated GEMMs.

fprop keeps codes, scales and clip masks; the backward GEMMs whose operand is ``saved`` start from those
codes, and their result is masked before the forward rotation is undone:

    dgrad   gX = ([G(E)·G(Ŵᵀ)ᵀ] ⊙ M_x)·H        wgrad   gW = ([G(Eᵀ)·G(X̂ᵀ)ᵀ] ⊙ M_w)·H

Where one scale is the whole tensor's, quantising commutes with transposing: Q(Xᵀ) = Q(X)ᵀ. Such a quantiser is put on
the tensor as it lies in memory and its codes are transposed, so that one quantise of E serves dgrad and wgrad, and a
saved operand that is wanted in the format it was saved in is its codes, transposed.

A backward GEMM without quantisers whose operand is ``saved`` multiplies what fprop quantised in the model's dtype:

    dgrad   gX = E·Ŵ        wgrad   gW = Eᵀ·X̂        (straight through)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from quartet.kernels.reference.philox import Draw
from quartet.kernels.spec import QuantSpec
from quartet.lowering import ir
from quartet.lowering.ir.graph import Builder, aten, editing, is_backward, keep_as, replace_all, shape, val
from quartet.lowering.ir.grouped import QUANTIZE_GROUPS
from quartet.lowering.ir.products import SWAP, turned
from quartet.lowering.targets.chains import REUSABLE, Source
from quartet.passes.find.find_matmuls import input_indices
from quartet.passes.graph_pass import graph_pass
from quartet.passes.quantize.delayed import amax_of, without_history
from quartet.passes.quantize.randomness import draw_seed
from quartet.passes.sites import SITE_KEY, Planned, Quantized, QuantizedOperand, Rotated, RotatedGemm, Start
from quartet.passes.state import State

WHOLE_VIEWS = (aten.permute.default, aten.t.default, aten.alias.default, torch.ops.prims.convert_element_type.default)
OPERANDS = {"fprop": ("x", "w"), "dgrad": ("e", "w"), "wgrad": ("e", "x")}  # a, b
_DRAWS = {"dgrad": (Draw.DGRAD_A, Draw.DGRAD_B), "wgrad": (Draw.WGRAD_A, Draw.WGRAD_B)}


@graph_pass(reads=Rotated, writes=Quantized,
            summary="quantise nodes on the operands, scaled products, clip masks (of recipes that have them) on the "
                    "gradients")
def quantize(state: State) -> None:
    """Replace every planned product by quantise nodes and a scaled one."""
    with editing(state.gm):
        for site in state.at(Rotated):
            quantized = Quantized(**vars(_remarked(state, site)))
            for role, rotated in site.gemms.items():
                if rotated.gemm.specs is not None:
                    quantized = _product(state, quantized, role, rotated, *rotated.gemm.specs)
                elif rotated.start is not None:
                    quantized = _straight_through(state, quantized, role, rotated.mm, rotated.start)
            state.advance(quantized)


def _remarked(state: State, site: Rotated) -> Rotated:
    """The site with a remark where delayed scaling has no history for an operand."""
    delayed = [operand for role, rotated in site.gemms.items() if rotated.gemm.specs is not None
               for operand, spec in zip(OPERANDS[role], rotated.gemm.specs, strict=True) if spec.rule == "delayed"]
    for reason in dict.fromkeys(filter(None, (without_history(state, site, operand) for operand in delayed))):
        for role in site.gemms:
            site = site.remark(role, f"scaled by the current amax: {reason}")
    return site


def _product(state: State, site: Quantized, role: str, rotated: RotatedGemm, a_spec: QuantSpec,
             b_spec: QuantSpec) -> Quantized:
    mm, a, b = rotated.mm, state.current(rotated.a), state.current(rotated.b)
    gradient = role != "fprop"
    build = Builder(state.gm.graph, like=mm, before=mm, backward=is_backward(mm))
    saved = None
    if rotated.start is not None:
        start = replace(rotated.start, source=state.current(rotated.start.source))
        saved = _saved_codes(state, build, site, role, rotated, start, a_spec, b_spec)
        if saved is None:
            _start_from_saved(state, site, role, start)
    if gradient:
        draws = _DRAWS[role]
        owner = site.x_group if role == "wgrad" else site.index
        bits = (draws[0].of(site.index), draws[1].of(owner))
    else:
        bits = (Draw.FPROP_A.of(site.x_group), Draw.FPROP_B.of(site.index))
    names = OPERANDS[role]
    if a_spec.multiple != b_spec.multiple:
        multiple = max(a_spec.multiple, b_spec.multiple)
        a, b = build.padded(a, cols=multiple), build.padded(b, cols=multiple)
    ends = site.ends if role == "wgrad" else None
    qa = quantize_node(state, build, a, a_spec, bits[0], (site, names[0]), ends)
    qb = saved or quantize_node(state, build, b, b_spec, bits[1], (site, names[1]), ends)
    if state.config.reuse_weights and not gradient and len(site.products) > 1:
        _mark_reusable(state, qb)
    operands: tuple[Any, ...] = qa.codes, qa.scales, qb.codes, qb.scales, str(qa.spec), str(qb.spec), val(mm).dtype
    if site.groups is not None:
        operands = *operands, site.ends, role == "wgrad"
    elif site.batch is not None:
        operands = *operands, build.size(site.batch)
    out = build(site.scaled, *operands, *_outer_scales(qa, qb))
    keep_as(out, site.products[role].node)
    out.meta[SITE_KEY] = (site.index, role)
    state.kernels[site.index, role] = "reference"  # until lowering finds better
    if rotated.start is not None:
        out = _masked(build, site, role, out)
    state.replace(mm, out)
    return site if gradient else replace(site, operands={"x": qa, "w": qb}, saved_bytes=_saved_bytes(site, qa, qb))


def _straight_through(state: State, site: Quantized, role: str, mm: Node, start: Start) -> Quantized:
    """Let the product in the model's dtype read what fprop quantised."""
    _start_from_saved(state, site, role, replace(start, source=state.current(start.source)))
    following = next(iter(mm.users))
    out = _masked(Builder(state.gm.graph, like=mm, before=following, backward=is_backward(mm)), site, role, mm)
    if out is not mm:
        replace_all(mm, out)
    element = site.operands[OPERANDS[role][1]].spec.element
    reason = f"straight through: in high precision, with the dequantised {element} of forward"
    return replace(site, reasons={**site.reasons, role: reason})


def _masked(build: Builder, site: Quantized, role: str, out: Node) -> Node:
    """A gradient without the elements that fprop clipped, where its quantiser tells them."""
    mask = site.operands["x" if role == "dgrad" else "w"].mask
    return out if mask is None else build(ir.APPLY_MASK, out, mask)


def _outer_scales(a: QuantizedOperand, b: QuantizedOperand) -> tuple[Node | None, ...]:
    """Further arguments of a product whose operands have a factor for the whole tensor."""
    factors = tuple(q.amax if q.spec.scale == "e4m3" else None for q in (a, b))
    return () if factors == (None, None) else factors


def _mark_reusable(state: State, weight: QuantizedOperand) -> None:
    """Name the parameter whose quantised form is the same in every forward of an optimizer step."""
    quantizer = ir.quantizer_of(weight.codes)[0]
    source = Source.of(quantizer)
    origin, stack, flipped = source.x, source.x.target is aten.reshape.default, False
    while origin.op == "call_function" and (origin.target in WHOLE_VIEWS or stack and origin is source.x):
        if stack and origin.target is aten.permute.default:
            if origin.args[1] != SWAP:
                return
            flipped = not flipped
        assert isinstance(origin.args[0], Node)
        origin = origin.args[0]
    if flipped:  # matrices that were transposed one by one have the shape and the strides of any others
        return
    fixed = not weight.spec.stochastic and source.fixed_basis and "recompute" not in quantizer.meta
    if fixed and input_indices(state.gm.graph).get(origin) in state.config.weights:
        quantizer.meta[REUSABLE] = origin


def quantize_node(state: State, build: Builder, x: Node, spec: QuantSpec, bits: int,
                  owner: tuple[Planned, str], ends: Node | None = None) -> QuantizedOperand:
    """Insert a quantise of ``x``, the operand ``"x"``, ``"w"`` or ``"e"`` of a site, and its results.

    ``ends``: where the groups end along the last axis, if it has groups; a row's scale is then one in each.
    """
    if ends is not None and spec.block == "row":
        node = build(QUANTIZE_GROUPS, x, str(spec), ends)
        return QuantizedOperand(build.item(node, 0), build.item(node, 1), None, spec)
    if spec.commutes_with_transpose and x.target is aten.permute.default:
        assert isinstance(x.args[0], Node)
        return _transposed(build, quantize_node(state, build, x.args[0], spec, bits, owner))
    seed = draw_seed(state, val(x).device) if spec.stochastic else None
    amax = _amax(state, build, x, spec, owner) if spec.takes_amax else None
    given = () if amax is None else (amax,)
    node = build(ir.QUANTIZE, x, str(spec), seed, bits if spec.stochastic else 0, *given)
    codes, scales = build.item(node, 0), build.item(node, 1)
    return QuantizedOperand(codes, scales, build.item(node, 2) if spec.mask else None, spec, amax)


def _amax(state: State, build: Builder, x: Node, spec: QuantSpec, owner: tuple[Planned, str]) -> Node:
    """The largest magnitude of ``x``, which a transpose does not change."""
    base = x.args[0] if x.target is aten.permute.default else x
    assert isinstance(base, Node)
    if spec.rule == "delayed":
        return amax_of(state, build, base, spec, *owner)
    return build(ir.AMAX, base)


def _transposed(build: Builder, q: QuantizedOperand) -> QuantizedOperand:
    """The transpose of a quantised tensor with one scale."""
    back = q.codes.args[0] if q.codes.target is aten.permute.default else None
    return replace(q, codes=back if isinstance(back, Node) else build.transpose(q.codes))


def _saved(state: State, site: Quantized, role: str, start: Start) -> QuantizedOperand:
    """What fprop made of operand b; where the recipe does not keep the weight, quantised again before its transpose."""
    made = site.operands[OPERANDS[role][1]]
    if role == "dgrad" and not site.recipe.keep_weights and is_backward(site.gradients[role].node):
        return _quantize_again(state, start.reader, start.source, made)
    return made


def _saved_codes(state: State, build: Builder, site: Quantized, role: str, rotated: RotatedGemm, start: Start,
                 a_spec: QuantSpec, wanted: QuantSpec) -> QuantizedOperand | None:
    """Operand b as the codes of fprop, transposed; None when it is rotated or wanted in another format, or longer."""
    made = site.operands[OPERANDS[role][1]]
    in_a_basis = rotated.b.target is ir.HADAMARD
    if in_a_basis or made.spec != wanted or not wanted.commutes_with_transpose or a_spec.multiple > wanted.multiple:
        return None
    codes = _saved(state, site, role, start)
    count = site.groups.count if site.groups is not None and role == "dgrad" else site.batch
    return _transposed(build, codes) if count is None else replace(codes, codes=turned(build, count, codes.codes))


def _start_from_saved(state: State, site: Quantized, role: str, start: Start) -> None:
    """Let operand b start from the codes of fprop instead of the tensor that fprop quantised."""
    source, reader = start.source, start.reader
    made = _saved(state, site, role, start)
    at = Builder(state.gm.graph, like=reader, before=reader, backward=is_backward(reader))
    values = at(ir.DEQUANTIZE, made.codes, made.scales, str(made.spec), val(source).dtype,
                *(() if made.amax is None else (made.amax,)))
    reader.replace_input_with(source, at.columns(values, shape(source)[1]))


def _quantize_again(state: State, before: Node, source: Node, made: QuantizedOperand) -> QuantizedOperand:
    """The same codes computed once more in backward, so that the packed weight need not be kept.

    PyTorch merges equal nodes across the two directions. What tells this one apart is another site, of which a
    quantiser without random bits makes no use; after a rotation, which would be merged and kept, it stays as it is.
    """
    at = Builder(state.gm.graph, like=before, before=before, backward=True)
    quantizer, flipped = ir.quantizer_of(made.codes)
    again, spec, seed, number, *given = quantizer.args
    if source.target is ir.HADAMARD:
        again = at(source.target, *source.args)
    elif seed is None:
        number = 1
    node = at(ir.QUANTIZE, again, spec, seed, number, *given)
    q = QuantizedOperand(at.item(node, 0), at.item(node, 1), None, made.spec, made.amax)
    return _transposed(at, q) if flipped else q


def _saved_bytes(site: Planned, x: QuantizedOperand, w: QuantizedOperand) -> int | None:
    """Bytes of codes, scales and masks that backward reads, those of a shared X counted at its first site."""
    total = 0
    for name, made, role, gradient in (("x", x, "wgrad", "dgrad"), ("w", w, "dgrad", "wgrad")):
        parts = []
        if name == "x" and (site.recomputes_x or site.x_group != site.index):
            continue
        gemm = site.active(role)
        if gemm is not None and gemm.b.source == "saved" and (name == "x" or site.recipe.keep_weights):
            parts += [made.codes, made.scales]
        if made.mask is not None and site.active(gradient) is not None:
            parts.append(made.mask)
        for node in parts:
            size = val(node).numel() * val(node).element_size()
            if not isinstance(size, int):
                return None
            total += size
    return total
