"""Put quantisers on the operands of the rotated GEMMs.

fprop keeps codes, scales and clip masks; the backward GEMMs whose operand is ``saved`` start from those
codes, and their result is masked before the forward rotation is undone:

    dgrad   gX = ([G(E)·G(Ŵᵀ)ᵀ] ⊙ M_x)·H        wgrad   gW = ([G(Eᵀ)·G(X̂ᵀ)ᵀ] ⊙ M_w)·H

Where one scale is the whole tensor's, quantising commutes with transposing: Q(Xᵀ) = Q(X)ᵀ. Such a quantiser is put on
the tensor as it lies in memory and its codes are transposed, so that one quantise of E serves dgrad and wgrad, and a
saved operand that is wanted in the format it was saved in is its codes, transposed.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Node

from quartet.kernels.reference.philox import Draw
from quartet.kernels.spec import QuantSpec
from quartet.lowering import ir
from quartet.lowering.chains import REUSABLE, Source
from quartet.lowering.graph import Builder, aten, editing, keep_as, shape, val
from quartet.lowering.recipe import Gemm
from quartet.passes.find_matmuls import input_indices
from quartet.passes.sites import SITE_KEY, MatmulSite, Product, Quantized
from quartet.passes.state import State, draw_seed, recipe_of

WHOLE_VIEWS = (aten.permute.default, aten.t.default, aten.alias.default, torch.ops.prims.convert_element_type.default)
_DRAWS = {"dgrad": (Draw.DGRAD_A, Draw.DGRAD_B), "wgrad": (Draw.WGRAD_A, Draw.WGRAD_B)}


def quantize(state: State) -> None:
    """Replace every planned product by quantise nodes and a scaled_mm."""
    with editing(state.gm):
        for site in state.planned():
            for role in ("fprop", "dgrad", "wgrad"):
                gemm = site.active(role)
                if gemm is not None and gemm.a.spec is not None:
                    _product(state, site, role, gemm)


def _product(state: State, site: MatmulSite, role: str, gemm: Gemm) -> None:
    product = site.products[role]
    assert product.mm is not None and product.a is not None and product.b is not None
    assert gemm.a.spec is not None and gemm.b.spec is not None
    mm, a, b = product.mm, state.current(product.a), state.current(product.b)
    backward = role != "fprop"
    build = Builder(state.gm.graph, like=mm, before=mm, backward=backward)
    saved = None
    if product.source is not None:
        product.source = state.current(product.source)
        saved = _saved_codes(state, build, site, role, product, gemm.b.spec)
        if saved is None:
            _start_from_saved(state, site, role, product)
    if backward:
        draws = _DRAWS[role]
        owner = site.x_group if role == "wgrad" else site.index
        bits = (draws[0].of(site.index), draws[1].of(owner))
    else:
        bits = (Draw.FPROP_A.of(site.x_group), Draw.FPROP_B.of(site.index))
    qa = quantize_node(state, build, a, gemm.a.spec, bits[0])
    qb = saved or quantize_node(state, build, b, gemm.b.spec, bits[1])
    if state.config.reuse_weights and not backward and len(site.products) > 1:
        _mark_reusable(state, qb)
    out = build(ir.SCALED_MM, qa.codes, qa.scales, qb.codes, qb.scales, str(qa.spec), str(qb.spec), val(mm).dtype)
    keep_as(out, product.node)
    out.meta[SITE_KEY] = (site.index, role)
    state.kernels[site.index, role] = "reference"  # until lowering finds better
    if not backward:
        site.quantized = {"x": qa, "w": qb}
        site.saved_bytes = _saved_bytes(site)
    elif product.source is not None:
        mask = site.quantized["x" if role == "dgrad" else "w"].mask
        if mask is not None:
            out = build(ir.APPLY_MASK, out, mask)
    state.replace(mm, out)
    product.mm = out


def _mark_reusable(state: State, weight: Quantized) -> None:
    """Name the parameter whose quantised form is the same in every forward of an optimizer step."""
    quantizer = ir.quantizer_of(weight.codes)[0]
    source = Source.of(quantizer)
    origin = source.x
    while origin.op == "call_function" and origin.target in WHOLE_VIEWS:
        assert isinstance(origin.args[0], Node)
        origin = origin.args[0]
    fixed = not weight.spec.stochastic and source.signs is None and "recompute" not in quantizer.meta
    if fixed and input_indices(state.gm.graph).get(origin) in state.config.weights:
        quantizer.meta[REUSABLE] = origin


def quantize_node(state: State, build: Builder, x: Node, spec: QuantSpec, bits: int) -> Quantized:
    """Insert a quantise of ``x`` and its results."""
    if spec.commutes_with_transpose and x.target is aten.permute.default:
        assert isinstance(x.args[0], Node)
        return _transposed(build, quantize_node(state, build, x.args[0], spec, bits))
    seed = draw_seed(state, val(x).device) if spec.stochastic else None
    node = build(ir.QUANTIZE, x, str(spec), seed, bits if spec.stochastic else 0)
    codes, scales = build.item(node, 0), build.item(node, 1)
    return Quantized(codes, scales, build.item(node, 2) if spec.mask else None, spec)


def _transposed(build: Builder, q: Quantized) -> Quantized:
    """The transpose of a quantised tensor with one scale."""
    back = q.codes.args[0] if q.codes.target is aten.permute.default else None
    return replace(q, codes=back if isinstance(back, Node) else build.transpose(q.codes))


def _saved(state: State, site: MatmulSite, role: str, product: Product) -> Quantized:
    """What fprop made of operand b; where the recipe does not keep the weight, quantised again before its transpose."""
    made, b, source = site.quantized["w" if role == "dgrad" else "x"], product.b, product.source
    assert b is not None and source is not None
    if role == "dgrad" and not recipe_of(site).keep_weights:
        return _quantize_again(state, _transpose_of_source(product), source, made)
    return made


def _transpose_of_source(product: Product) -> Node:
    b = product.b
    assert b is not None
    transposed = b.args[0] if b.target is ir.HADAMARD else b
    assert isinstance(transposed, Node) and transposed.args[0] is product.source
    return transposed


def _saved_codes(state: State, build: Builder, site: MatmulSite, role: str, product: Product,
                 wanted: QuantSpec) -> Quantized | None:
    """Operand b as the codes of fprop, transposed; None when it is rotated or wanted in another format."""
    made = site.quantized["w" if role == "dgrad" else "x"]
    rotated = product.b is not None and product.b.target is ir.HADAMARD
    if rotated or made.spec != wanted or not wanted.commutes_with_transpose:
        return None
    return _transposed(build, _saved(state, site, role, product))


def _start_from_saved(state: State, site: MatmulSite, role: str, product: Product) -> None:
    """Let operand b start from the codes of fprop instead of the tensor that fprop quantised."""
    source, transposed = product.source, _transpose_of_source(product)
    assert source is not None
    made = _saved(state, site, role, product)
    at = Builder(state.gm.graph, like=transposed, before=transposed, backward=True)
    values = at(ir.DEQUANTIZE, made.codes, made.scales, str(made.spec), val(source).dtype)
    transposed.replace_input_with(source, at.columns(values, shape(source)[1]))


def _quantize_again(state: State, before: Node, source: Node, made: Quantized) -> Quantized:
    """The same codes computed once more in backward, so that the packed weight need not be kept.

    PyTorch merges equal nodes across the two directions. What tells this one apart is another site, of which a
    quantiser without random bits makes no use; after a rotation, which would be merged and kept, it stays as it is.
    """
    at = Builder(state.gm.graph, like=before, before=before, backward=True)
    quantizer, flipped = ir.quantizer_of(made.codes)
    again, spec, seed, number = quantizer.args
    if source.target is ir.HADAMARD:
        again = at(source.target, *source.args)
    elif seed is None:
        number = 1
    node = at(ir.QUANTIZE, again, spec, seed, number)
    q = Quantized(at.item(node, 0), at.item(node, 1), None, made.spec)
    return _transposed(at, q) if flipped else q


def _saved_bytes(site: MatmulSite) -> int | None:
    """Bytes of codes, scales and masks that backward reads, those of a shared X counted at its first site."""
    recipe = site.recipe
    assert recipe is not None
    total = 0
    for name, role, gradient in (("x", "wgrad", "dgrad"), ("w", "dgrad", "wgrad")):
        made = site.quantized[name]
        parts = []
        if name == "x" and site.x_group != site.index:
            continue
        gemm = site.active(role)
        if gemm is not None and gemm.b.source == "saved" and (name == "x" or recipe.keep_weights):
            parts += [made.codes, made.scales]
        if made.mask is not None and site.active(gradient) is not None:
            parts.append(made.mask)
        for node in parts:
            size = val(node).numel() * val(node).element_size()
            if not isinstance(size, int):
                return None
            total += size
    return total
