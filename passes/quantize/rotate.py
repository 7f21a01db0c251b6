"""Write the planned GEMMs as A · Bᵀ in the rotated basis. Exact: the graph still computes the same function.

    fprop   Y  = (X·H)(W·H)ᵀ
    dgrad   gX = [(E·S·H)(Ŵᵀ·S·H)ᵀ]·H       Ŵ = W·H when the operand is what fprop quantised, else W and no last H
    wgrad   gW = [(Eᵀ·S·H)(X̂ᵀ·S·H)ᵀ]·H      X̂ likewise

The rotations of a GEMM's two operands cancel; what remains to undo is the rotation of fprop, and an outer one, of
operand a along its rows: (H·A)·Bᵀ = H·(A·Bᵀ).
"""

from __future__ import annotations

import torch
from torch.fx import Node

from quartet.kernels.reference.philox import Draw
from quartet.lowering import ir
from quartet.lowering.ir.graph import Builder, editing, is_backward, keep_as, val
from quartet.lowering.ir.products import multiply
from quartet.lowering.ir.views import Hadamard
from quartet.lowering.recipe.types import ROLES, Gemm, Rotation
from quartet.passes.graph_pass import graph_pass
from quartet.passes.quantize.layout import Layout, layout_of
from quartet.passes.quantize.randomness import draw_seed
from quartet.passes.rewriting import added
from quartet.passes.sites import Planned, Rotated, RotatedGemm, Start
from quartet.passes.state import State

SIGN_DRAWS = {"fprop": Draw.FPROP_SIGNS, "dgrad": Draw.DGRAD_SIGNS, "wgrad": Draw.WGRAD_SIGNS}


@graph_pass(reads=Planned, writes=Rotated,
            summary="every planned GEMM as A · Bᵀ in the Hadamard basis; the function is unchanged")
def rotate(state: State) -> None:
    """Rewrite every active GEMM of the planned sites."""
    with editing(state.gm):
        for site in state.at(Planned):
            planned = {role: gemm for role in ROLES if (gemm := site.active(role)) is not None}
            if not planned:
                continue
            layout, gemms = layout_of(state, site, planned), dict[str, RotatedGemm]()
            for role, gemm in planned.items():
                gemms[role] = (_fprop(state, layout, gemm) if role == "fprop" else
                               _backward(state, layout, role, gemm, gemms.get("fprop")))
            notes = {"notes": (*site.notes, *layout.notes)}
            state.advance(Rotated(**vars(site) | notes, gemms=gemms))


def _signs(state: State, build: Builder, site: Planned, role: str, rotation: Rotation | None) -> Node | None:
    if rotation is None or rotation.signs == "none":
        return None
    if isinstance(rotation.signs, tuple):
        return build(ir.FIXED_SIGNS, list(rotation.signs), val(site.x[0]).device)
    owner = site.x_group if role == "wgrad" else site.index
    return build(ir.SIGNS, draw_seed(state, val(site.x[0]).device), SIGN_DRAWS[role].of(owner), rotation.n)


def _rotated(build: Builder, x: Node, rotation: Rotation | None, signs: Node | None) -> Node:
    return x if rotation is None else build(ir.HADAMARD, x, rotation.n, signs, False, torch.float32)


def _outer(build: Builder, layout: Layout, a: Node, gemm: Gemm) -> Node:
    """Operand a, transformed along its rows where the GEMM says so; zeros fill the last block."""
    if gemm.outer is None:
        return a
    return layout.flip(build, build(ir.HADAMARD, layout.flip(build, a), gemm.outer.n, None, False, val(a).dtype))


def _undo_outer(build: Builder, layout: Layout, role: str, out: Node, gemm: Gemm) -> Node:
    if gemm.outer is None:
        return out
    rows, turned = layout.rows(role, out), layout.flip_result(build, role, out)
    undone = build(ir.HADAMARD, turned, gemm.outer.n, None, True, val(out).dtype)
    return layout.flip_result(build, role, build.columns(undone, rows))


def _product(build: Builder, layout: Layout, role: str, a: Node, b: Node) -> Node:
    common = torch.promote_types(val(a).dtype, val(b).dtype)
    mm = multiply(build, layout.kind(role), build.cast(a, common), build.cast(b, common))
    return build.cast(keep_as(mm, layout.site.products[role].node), layout.site.dtype_of(role))


def _fprop(state: State, layout: Layout, gemm: Gemm) -> RotatedGemm:
    node = layout.site.forward.node
    build = Builder(node.graph, like=node, before=node, backward=False)
    signs = _signs(state, build, layout.site, "fprop", gemm.rotation)
    a = _rotated(build, _outer(build, layout, layout.x(build), gemm), gemm.rotation, signs)
    b = _rotated(build, layout.w(build), gemm.rotation, signs)
    mm = _product(build, layout, "fprop", a, b)
    _put(state, build, layout, "fprop", _undo_outer(build, layout, "fprop", mm, gemm))
    return RotatedGemm(gemm, a, b, mm, layout.kind("fprop"))


def _backward(state: State, layout: Layout, role: str, gemm: Gemm, forward: RotatedGemm | None) -> RotatedGemm:
    node = layout.site.gradients[role].node
    build = Builder(node.graph, like=node, before=node, backward=is_backward(node))
    saved = forward if gemm.b.source == "saved" else None
    e = layout.e(build, role)
    kept = None if saved is None else state.current(saved.b if role == "dgrad" else saved.a)
    origin = layout.origin(build, role, kept)
    signs = _signs(state, build, layout.site, role, gemm.rotation)
    a = e if role == "dgrad" else layout.flip(build, e)
    a = _rotated(build, _outer(build, layout, a, gemm), gemm.rotation, signs)
    across = layout.across(build, role, origin)
    start = None if kept is None else Start(kept, reader=list(kept.users)[-1])
    b = _rotated(build, across, gemm.rotation, signs)
    mm = _product(build, layout, role, a, b)
    out = _undo_outer(build, layout, role, mm, gemm)
    if saved is not None and kept is not None and saved.gemm.rotation is not None:  # gradients of a rotated operand
        out = build(ir.HADAMARD, out, saved.gemm.rotation.n, Hadamard.of(kept).signs, True, layout.site.dtype_of(role))
    _put(state, build, layout, role, out)
    return RotatedGemm(gemm, a, b, mm, layout.kind(role), start)


def _put(state: State, build: Builder, layout: Layout, role: str, out: Node) -> None:
    """A product of the layout in the place of the model's."""
    old = layout.site.products[role].node
    out = layout.restored(build, role, build.columns(out, layout.site.dims(role)[1]))
    state.replace(old, added(build, out, old))
