"""Write the planned GEMMs as A · Bᵀ in the rotated basis. Exact: the graph still computes the same function.

    fprop   Y  = (X·H)(W·H)ᵀ
    dgrad   gX = [(E·S·H)(Ŵᵀ·S·H)ᵀ]·H       Ŵ = W·H when the operand is what fprop quantised, else W and no last H
    wgrad   gW = [(Eᵀ·S·H)(X̂ᵀ·S·H)ᵀ]·H      X̂ likewise

The rotations of a GEMM's two operands cancel; what remains to undo is the rotation of fprop, and an outer one, of
operand a along its rows: (H·A)·Bᵀ = H·(A·Bᵀ).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from quartet.kernels.reference.philox import Draw
from quartet.lowering import ir
from quartet.lowering.ir.graph import Builder, editing, is_backward, keep_as, shape, val
from quartet.lowering.recipe.types import Gemm, Rotation
from quartet.passes.quantize import batched
from quartet.passes.quantize.batched import flip, matrix, restored
from quartet.passes.quantize.randomness import draw_seed
from quartet.passes.rewriting import added
from quartet.passes.sites import MatmulSite
from quartet.passes.state import State, recipe_of
from quartet.runtime.sizes import same_sizes

SIGN_DRAWS = {"fprop": Draw.FPROP_SIGNS, "dgrad": Draw.DGRAD_SIGNS, "wgrad": Draw.WGRAD_SIGNS}


def rotate(state: State) -> None:
    """Rewrite every active GEMM of the planned sites."""
    with editing(state.gm):
        for site in state.planned():
            if site.groups is not None:
                continue
            if site.active("fprop"):
                _fprop(state, site)
            for role in ("dgrad", "wgrad"):
                if site.active(role):
                    _backward(state, site, role)


def _normal(state: State, build: Builder, site: MatmulSite, operand: tuple[Node, bool]) -> Node:
    return matrix(build, site, state.current(operand[0]), operand[1])


def signs_of(state: State, build: Builder, site: MatmulSite, role: str, rotation: Rotation) -> Node | None:
    if rotation.signs == "none":
        return None
    if isinstance(rotation.signs, tuple):
        return build(ir.FIXED_SIGNS, list(rotation.signs), val(site.x[0]).device)
    owner = site.x_group if role == "wgrad" else site.index
    return build(ir.SIGNS, draw_seed(state, val(site.x[0]).device), SIGN_DRAWS[role].of(owner), rotation.n)


def rotated(build: Builder, x: Node, rotation: Rotation | None, signs: Node | None) -> Node:
    return x if rotation is None else build(ir.HADAMARD, x, rotation.n, signs, False, torch.float32)


def _outer(build: Builder, site: MatmulSite, a: Node, gemm: Gemm) -> Node:
    """Operand a, transformed along its rows where the GEMM says so; zeros fill the last block."""
    if gemm.outer is None:
        return a
    return flip(build, site, build(ir.HADAMARD, flip(build, site, a), gemm.outer.n, None, False, val(a).dtype))


def _undo_outer(build: Builder, site: MatmulSite, out: Node, gemm: Gemm, rows: Any) -> Node:
    if gemm.outer is None:
        return out
    undone = build(ir.HADAMARD, flip(build, site, out), gemm.outer.n, None, True, val(out).dtype)
    return flip(build, site, build.columns(undone, rows))


def _product(build: Builder, site: MatmulSite, role: str, a: Node, b: Node) -> Node:
    product = site.products[role]
    common = torch.promote_types(a.meta["val"].dtype, b.meta["val"].dtype)
    mm = keep_as(batched.product(build, site, build.cast(a, common), build.cast(b, common)), product.node)
    product.a, product.b, product.mm = a, b, build.cast(mm, site.dtype_of(role))
    return product.mm


def _fprop(state: State, site: MatmulSite) -> None:
    product, gemm = site.products["fprop"], recipe_of(site).fprop
    assert gemm is not None
    build = Builder(state.gm.graph, like=product.node, before=product.node, backward=False)
    signs = signs_of(state, build, site, "fprop", gemm.rotation) if gemm.rotation else None
    a = rotated(build, _outer(build, site, _normal(state, build, site, site.x), gemm), gemm.rotation, signs)
    b = rotated(build, _normal(state, build, site, site.w), gemm.rotation, signs)
    out = _undo_outer(build, site, _product(build, site, "fprop", a, b), gemm, site.m)
    out = restored(build, site, out, product.flipped)
    state.replace(product.node, added(build, out, product.node))


def _backward(state: State, site: MatmulSite, role: str) -> None:
    product, recipe = site.products[role], recipe_of(site)
    gemm, forward = getattr(recipe, role), recipe.fprop
    build = Builder(state.gm.graph, like=product.node, before=product.node, backward=is_backward(product.node))
    e = _normal(state, build, site, site.gradient_of(role))
    operand, width = (site.w, site.k) if role == "dgrad" else (site.x, site.k)
    rotation, undo = gemm.rotation, None
    if gemm.b.source == "saved":
        made = site.products["fprop"]
        kept = made.b if role == "dgrad" else made.a
        assert kept is not None
        source = product.source = state.current(kept)
        undo = forward.rotation if forward is not None else None
    else:
        source = _normal(state, build, site, operand)
    signs = signs_of(state, build, site, role, rotation) if rotation else None
    a = rotated(build, _outer(build, site, e if role == "dgrad" else flip(build, site, e), gemm), rotation, signs)
    across = flip(build, site, source)
    product.reader = list(source.users)[-1]
    b = rotated(build, across, rotation, signs)
    out = _undo_outer(build, site, _product(build, site, role, a, b), gemm, site.dims(role)[0])
    if undo is not None:
        assert source.target is ir.HADAMARD
        out = build(ir.HADAMARD, out, undo.n, source.args[2], True, site.dtype_of(role))
    out = added(build, restored(build, site, build.columns(out, width), product.flipped), product.node)
    assert same_sizes(shape(out), shape(product.node)), (shape(out), shape(product.node))
    state.replace(product.node, out)
