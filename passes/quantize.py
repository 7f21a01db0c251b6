"""Put quantisers on the operands of the rotated GEMMs.

fprop keeps codes, scales and clip masks; the backward GEMMs whose operand is ``saved`` start from those
codes, and their result is masked before the forward rotation is undone:

    dgrad   gX = ([G(E)·G(Ŵᵀ)ᵀ] ⊙ M_x)·H        wgrad   gW = ([G(Eᵀ)·G(X̂ᵀ)ᵀ] ⊙ M_w)·H
"""

from __future__ import annotations

from torch.fx import Node

from quartet.kernels.reference.philox import Draw
from quartet.kernels.spec import QuantSpec
from quartet.lowering import ir
from quartet.lowering.graph import Builder, editing, keep_as, replace_all, shape, val
from quartet.lowering.recipe import Gemm
from quartet.passes.sites import SITE_KEY, MatmulSite, Product, Quantized
from quartet.passes.state import State, draw_seed, recipe_of

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
    mm, a, b = product.mm, product.a, product.b
    assert mm is not None and a is not None and b is not None and gemm.a.spec is not None and gemm.b.spec is not None
    backward = role != "fprop"
    build = Builder(state.gm.graph, like=mm, before=mm, backward=backward)
    if product.source is not None:
        _start_from_saved(state, build, site, role, product)
    if backward:
        draws = _DRAWS[role]
        owner = site.x_group if role == "wgrad" else site.index
        bits = (draws[0].of(site.index), draws[1].of(owner))
    else:
        bits = (Draw.FPROP_A.of(site.x_group), Draw.FPROP_B.of(site.index))
    qa = quantize_node(state, build, a, gemm.a.spec, bits[0])
    qb = quantize_node(state, build, b, gemm.b.spec, bits[1])
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
    replace_all(mm, out)
    product.mm = out


def quantize_node(state: State, build: Builder, x: Node, spec: QuantSpec, bits: int) -> Quantized:
    """Insert a quantise of ``x`` and its results."""
    seed = draw_seed(state) if spec.stochastic else None
    node = build(ir.QUANTIZE, x, str(spec), seed, bits if spec.stochastic else 0)
    codes, scales = build.item(node, 0), build.item(node, 1)
    return Quantized(codes, scales, build.item(node, 2) if spec.mask else None, spec)


def _start_from_saved(state: State, build: Builder, site: MatmulSite, role: str, product: Product) -> None:
    """Let operand b start from the codes of fprop instead of the tensor that fprop quantised."""
    made, source = site.quantized["w" if role == "dgrad" else "x"], product.source
    b = product.b
    assert source is not None and b is not None
    transposed = b.args[0] if b.target is ir.HADAMARD else b
    assert isinstance(transposed, Node) and transposed.args[0] is source
    if role == "dgrad" and not recipe_of(site).keep_weights:
        made = _quantize_again(state, transposed, source, made)
    at = Builder(state.gm.graph, like=transposed, before=transposed, backward=True)
    values = at(ir.DEQUANTIZE, made.codes, made.scales, str(made.spec), val(source).dtype)
    transposed.replace_input_with(source, at.columns(values, shape(source)[1]))


def _quantize_again(state: State, before: Node, source: Node, made: Quantized) -> Quantized:
    """The same codes computed once more in backward, so that the packed weight need not be kept."""
    at = Builder(state.gm.graph, like=before, before=before, backward=True)
    again = at(source.target, *source.args) if source.target is ir.HADAMARD else source
    quantizer = made.codes.args[0]
    assert isinstance(quantizer, Node)
    node = at(ir.QUANTIZE, again, *quantizer.args[1:])
    return Quantized(at.item(node, 0), at.item(node, 1), None, made.spec)


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
