"""Write the planned GEMMs as A · Bᵀ in the rotated basis. Exact: the graph still computes the same function.

    fprop   Y  = (X·H)(W·H)ᵀ
    dgrad   gX = [(E·S·H)(Ŵᵀ·S·H)ᵀ]·H       Ŵ = W·H when the operand is what fprop quantised, else W and no last H
    wgrad   gW = [(Eᵀ·S·H)(X̂ᵀ·S·H)ᵀ]·H      X̂ likewise

The rotations of a GEMM's two operands cancel; what remains to undo is the rotation of fprop.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from quartet.kernels.reference.philox import Draw
from quartet.lowering import ir
from quartet.lowering.graph import Builder, aten, editing, keep_as, shape, val
from quartet.lowering.recipe import Rotation
from quartet.passes.sites import MatmulSite, Product
from quartet.passes.state import State, draw_seed, recipe_of

SIGN_DRAWS = {"fprop": Draw.FPROP_SIGNS, "dgrad": Draw.DGRAD_SIGNS, "wgrad": Draw.WGRAD_SIGNS}


def rotate(state: State) -> None:
    """Rewrite every active GEMM of the planned sites."""
    with editing(state.gm):
        for site in state.planned():
            if site.active("fprop"):
                _fprop(state, site)
            for role in ("dgrad", "wgrad"):
                if site.active(role):
                    _backward(state, site, role)


def _normal(state: State, build: Builder, operand: tuple[Node, bool]) -> Node:
    node = state.current(operand[0])
    return build.transpose(node) if operand[1] else node


def _signs(state: State, build: Builder, site: MatmulSite, role: str, rotation: Rotation) -> Node | None:
    if rotation.signs == "none":
        return None
    if isinstance(rotation.signs, tuple):
        return build(ir.FIXED_SIGNS, list(rotation.signs), val(site.x[0]).device)
    owner = site.x_group if role == "wgrad" else site.index
    return build(ir.SIGNS, draw_seed(state, val(site.x[0]).device), SIGN_DRAWS[role].of(owner), rotation.n)


def _rotated(build: Builder, x: Node, rotation: Rotation | None, signs: Node | None) -> Node:
    return x if rotation is None else build(ir.HADAMARD, x, rotation.n, signs, False, torch.float32)


def _product(build: Builder, site: MatmulSite, product: Product, a: Node, b: Node) -> Node:
    common = torch.promote_types(a.meta["val"].dtype, b.meta["val"].dtype)
    mm = keep_as(build(aten.mm.default, build.cast(a, common), build.transpose(build.cast(b, common))), product.node)
    product.a, product.b, product.mm = a, b, build.cast(mm, site.dtype)
    return product.mm


def _fprop(state: State, site: MatmulSite) -> None:
    product, gemm = site.products["fprop"], recipe_of(site).fprop
    assert gemm is not None
    build = Builder(state.gm.graph, like=product.node, before=product.node, backward=False)
    signs = _signs(state, build, site, "fprop", gemm.rotation) if gemm.rotation else None
    a = _rotated(build, _normal(state, build, site.x), gemm.rotation, signs)
    b = _rotated(build, _normal(state, build, site.w), gemm.rotation, signs)
    out = _product(build, site, product, a, b)
    if product.flipped:
        out = build.transpose(out)
    if product.node.target is aten.addmm.default:
        out = build(aten.add.Tensor, out, product.node.args[0])
    state.replace(product.node, out)


def _backward(state: State, site: MatmulSite, role: str) -> None:
    product, recipe = site.products[role], recipe_of(site)
    gemm, forward = getattr(recipe, role), recipe.fprop
    build = Builder(state.gm.graph, like=product.node, before=product.node, backward=True)
    assert site.gradient is not None
    e = _normal(state, build, site.gradient)
    operand, width = (site.w, site.k) if role == "dgrad" else (site.x, site.k)
    undo = None
    if gemm.b.source == "saved":
        made = site.products["fprop"]
        kept = made.b if role == "dgrad" else made.a
        assert kept is not None
        source = product.source = state.current(kept)
        undo = forward.rotation if forward is not None else None
    else:
        source = _normal(state, build, operand)
    rotation = gemm.rotation
    signs = _signs(state, build, site, role, rotation) if rotation else None
    a = _rotated(build, e if role == "dgrad" else build.transpose(e), rotation, signs)
    b = _rotated(build, build.transpose(source), rotation, signs)
    out = _product(build, site, product, a, b)
    if undo is not None:
        assert source.target is ir.HADAMARD
        out = build(ir.HADAMARD, out, undo.n, source.args[2], True, site.dtype)
    out = build.columns(out, width)
    if product.flipped:
        out = build.transpose(out)
    assert str(shape(out)) == str(shape(product.node)), (shape(out), shape(product.node))
    state.replace(product.node, out)
