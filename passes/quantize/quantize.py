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

from torch.fx import Node

from quartet.kernels.reference.philox import Draw
from quartet.kernels.spec import QuantSpec
from quartet.lowering import ir
from quartet.lowering.ir.graph import (
    Builder,
    argument,
    aten,
    editing,
    is_backward,
    keep_as,
    replace_all,
    shape,
    source_of,
    val,
)
from quartet.lowering.ir.operands import ROWS, Operand, Product, Quantizer
from quartet.lowering.ir.products import SWAP, turned
from quartet.lowering.ir.views import ApplyMask, Dequantize, Hadamard, Quantize, QuantizeGroups
from quartet.lowering.targets.chains import REUSABLE, Source
from quartet.passes.find.find_matmuls import input_indices
from quartet.passes.graph_pass import graph_pass
from quartet.passes.quantize.delayed import Histories, without_history
from quartet.passes.quantize.randomness import draw_seed
from quartet.passes.sites import SITE_KEY, Planned, Quantized, QuantizedOperand, Rotated, RotatedGemm, Start
from quartet.passes.state import State
from quartet.runtime.view_ops import CAST, ORDERS

OPERANDS = {"fprop": ("x", "w"), "dgrad": ("e", "w"), "wgrad": ("e", "x")}  # a, b
_WHOLE = ORDERS - {aten.transpose.int} | {aten.alias.default, CAST}  # of a parameter
_DRAWS = {"dgrad": (Draw.DGRAD_A, Draw.DGRAD_B), "wgrad": (Draw.WGRAD_A, Draw.WGRAD_B)}


@graph_pass(reads=Rotated, writes=Quantized,
            summary="quantise nodes on the operands, scaled products, clip masks (of recipes that have them) on the "
                    "gradients")
def quantize(state: State) -> None:
    """Replace every planned product by quantise nodes and a scaled one."""
    histories = Histories(state)
    with editing(state.gm):
        for site in state.at(Rotated):
            quantized = Quantized(**vars(_remarked(state, site)))
            for role, rotated in site.gemms.items():
                if rotated.gemm.specs is not None:
                    quantized = _product(state, histories, quantized, role, rotated, *rotated.gemm.specs)
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


def _product(state: State, histories: Histories, site: Quantized, role: str, rotated: RotatedGemm, a_spec: QuantSpec,
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
    ends = rotated.kind.ends if rotated.kind.over_tokens else None
    qa = quantize_node(state, histories, build, a, a_spec, bits[0], (site, names[0]), ends)
    qb = saved or quantize_node(state, histories, build, b, b_spec, bits[1], (site, names[1]), ends)
    if state.config.reuse_weights and not gradient and len(site.products) > 1:
        _mark_reusable(state, site, qb)
    left, right = (Operand.quantized(q.codes, q.scales, q.amax) for q in (qa, qb))
    out = keep_as(Product(left, right, val(mm).dtype, rotated.kind).emit(build), site.products[role].node)
    out.meta[SITE_KEY] = (site.index, role)
    if rotated.start is not None:
        out = _masked(build, site, role, out)
    state.replace(mm, out)
    site = site.computed(role, "reference")
    if gradient:
        return site
    site = replace(site, operands={"x": qa, "w": qb})
    return replace(site, saved_bytes=saved_bytes(site, qa, qb))


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
    return out if mask is None else ApplyMask(out, mask).emit(build)


def _mark_reusable(state: State, site: Planned, weight: QuantizedOperand) -> None:
    """Name the parameter whose quantised form is the same in every forward of an optimizer step."""
    quantizer = Quantizer.of(weight.codes).node
    source = Source.of(quantizer)
    origin, stack, flipped = source.x, source.x.target is aten.reshape.default, False
    while origin.target in _WHOLE or stack and origin is source.x:
        if stack and origin.target is aten.permute.default:
            if argument(origin, "dims") != SWAP:
                return
            flipped = not flipped
        origin = source_of(origin)
    if flipped and not _made_by_products(site, quantizer):
        return  # matrices that were transposed one by one have the shape and the strides of any others
    fixed = not weight.spec.stochastic and source.fixed_basis and "recompute" not in quantizer.meta
    if fixed and input_indices(state.gm.graph).get(origin) in state.config.weights:
        quantizer.meta[REUSABLE] = origin


def _made_by_products(site: Planned, quantizer: Node) -> bool:
    """Whether the products of groups that read these weights make the codes themselves."""
    kernels = [site.decisions[role].kernel for role in ("fprop", "dgrad") if site.active(role) is not None]
    return site.groups is not None and all(kernel is not None and kernel.makes_codes(quantizer) for kernel in kernels)


def _keeps_weights(site: Quantized) -> bool:
    """Whether backward reads the codes that forward has made of W."""
    quantizer = Quantizer.of(site.operands["w"].codes).node
    return site.recipe.keep_weights and not (REUSABLE in quantizer.meta and _made_by_products(site, quantizer))


def quantize_node(state: State, histories: Histories, build: Builder, x: Node, spec: QuantSpec, bits: int,
                  owner: tuple[Planned, str], ends: Node | None = None) -> QuantizedOperand:
    """Insert a quantise of ``x``, the operand ``"x"``, ``"w"`` or ``"e"`` of a site, and its results.

    ``ends``: where the groups end along the last axis, if it has groups; a row's scale is then one in each.
    """
    if ends is not None and spec.block == "row":
        node = QuantizeGroups(x, spec, ends).emit(build)
        return QuantizedOperand(build.item(node, 0), build.item(node, 1), None, spec)
    if spec.commutes_with_transpose and x.target is aten.permute.default:
        return _transposed(build, quantize_node(state, histories, build, source_of(x), spec, bits, owner))
    seed = draw_seed(state, val(x).device) if spec.stochastic else None
    amax = _amax(histories, build, x, spec, owner) if spec.takes_amax else None
    node = Quantize(x, spec, seed, bits if spec.stochastic else 0, amax).emit(build)
    codes, scales = build.item(node, 0), build.item(node, 1)
    return QuantizedOperand(codes, scales, build.item(node, 2) if spec.mask else None, spec, amax)


def _amax(histories: Histories, build: Builder, x: Node, spec: QuantSpec, owner: tuple[Planned, str]) -> Node:
    """The largest magnitude of ``x``, which a transpose does not change."""
    base = source_of(x) if x.target is aten.permute.default else x
    if spec.rule == "delayed":
        return histories.amax_of(build, base, *owner)
    return build(ir.AMAX, base)


def _transposed(build: Builder, q: QuantizedOperand) -> QuantizedOperand:
    """The transpose of a quantised tensor with one scale."""
    turned_back = q.codes.target is aten.permute.default
    return replace(q, codes=source_of(q.codes) if turned_back else build.transpose(q.codes))


def _saved(state: State, site: Quantized, role: str, start: Start) -> QuantizedOperand:
    """What fprop made of operand b; where the weight is not kept, quantised again before its transpose."""
    made = site.operands[OPERANDS[role][1]]
    if role != "dgrad" or _keeps_weights(site) or not is_backward(site.gradients[role].node):
        return made
    at = Builder(state.gm.graph, like=start.reader, before=start.reader, backward=True)
    again = quantize_again(at, start.source, made)
    if site.recipe.keep_weights:  # the products make the codes, where they may be reused
        Quantizer.of(again.codes).node.meta[REUSABLE] = Quantizer.of(made.codes).node.meta[REUSABLE]
    return again


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
    values = Dequantize(made.codes, made.scales, made.spec, val(source).dtype, made.amax).emit(at)
    reader.replace_input_with(source, at.columns(values, shape(source)[1]))


def quantize_again(at: Builder, source: Node, made: QuantizedOperand) -> QuantizedOperand:
    """The same codes computed once more in backward, so that the packed weight need not be kept.

    PyTorch merges equal nodes across the two directions. What tells this one apart is another site, of which a
    quantiser without random bits makes no use; after a rotation, which would be merged and kept, it stays as it is.
    """
    first = Quantizer.of(made.codes)
    again = Quantize.of(first.node)
    if source.target is ir.HADAMARD:
        again = replace(again, x=Hadamard.of(source).emit(at))
    elif again.seed is None:
        again = replace(again, site=1)
    node = again.emit(at)
    q = QuantizedOperand(at.item(node, 0), at.item(node, 1), None, made.spec, made.amax)
    return q if first.layout == ROWS else _transposed(at, q)


def saved_bytes(site: Quantized, x: QuantizedOperand, w: QuantizedOperand) -> int | None:
    """Bytes of codes, scales and masks that backward reads, those of a shared X counted at its first site."""
    total = 0
    for name, made, role, gradient in (("x", x, "wgrad", "dgrad"), ("w", w, "dgrad", "wgrad")):
        parts = []
        if name == "x" and (site.recomputes_x or site.x_group != site.index):
            continue
        gemm = site.active(role)
        if gemm is not None and gemm.b.source == "saved" and (name == "x" or _keeps_weights(site)):
            parts += [made.codes, made.scales]
        if made.mask is not None and site.active(gradient) is not None:
            parts.append(made.mask)
        for node in (part for part in parts if part.op != "placeholder"):
            size = val(node).numel() * val(node).element_size()
            if not isinstance(size, int):
                return None
            total += size
    return total
