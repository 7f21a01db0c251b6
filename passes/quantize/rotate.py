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
from quartet.lowering.ir.graph import Builder, editing, is_backward, keep_as, val
from quartet.lowering.ir.views import Hadamard
from quartet.lowering.recipe.types import Gemm, Rotation
from quartet.passes.graph_pass import graph_pass
from quartet.passes.quantize import batched
from quartet.passes.quantize.batched import flip, matrix, restored
from quartet.passes.quantize.randomness import draw_seed
from quartet.passes.rewriting import added
from quartet.passes.sites import Found, Planned, Rotated, RotatedGemm, Start
from quartet.passes.state import State
from quartet.passes.views import Operand

SIGN_DRAWS = {"fprop": Draw.FPROP_SIGNS, "dgrad": Draw.DGRAD_SIGNS, "wgrad": Draw.WGRAD_SIGNS}


@graph_pass(reads=Planned, writes=Rotated,
            summary="every planned GEMM as A · Bᵀ in the Hadamard basis; the function is unchanged")
def rotate(state: State) -> None:
    """Rewrite every active GEMM of the planned sites."""
    with editing(state.gm):
        for site in state.at(Planned):
            if site.groups is not None:
                continue
            gemms: dict[str, RotatedGemm] = {}
            if (gemm := site.active("fprop")) is not None:
                gemms["fprop"] = _fprop(state, site, gemm)
            for role in ("dgrad", "wgrad"):
                if (gemm := site.active(role)) is not None:
                    gemms[role] = _backward(state, site, role, gemm, gemms.get("fprop"))
            state.advance(Rotated(**vars(site), gemms=gemms))


def _normal(state: State, build: Builder, site: Found, operand: Operand) -> Node:
    return matrix(build, site, state.current(operand[0]), operand[1])


def signs_of(state: State, build: Builder, site: Planned, role: str, rotation: Rotation) -> Node | None:
    if rotation.signs == "none":
        return None
    if isinstance(rotation.signs, tuple):
        return build(ir.FIXED_SIGNS, list(rotation.signs), val(site.x[0]).device)
    owner = site.x_group if role == "wgrad" else site.index
    return build(ir.SIGNS, draw_seed(state, val(site.x[0]).device), SIGN_DRAWS[role].of(owner), rotation.n)


def rotated(build: Builder, x: Node, rotation: Rotation | None, signs: Node | None) -> Node:
    return x if rotation is None else build(ir.HADAMARD, x, rotation.n, signs, False, torch.float32)


def _outer(build: Builder, site: Found, a: Node, gemm: Gemm) -> Node:
    """Operand a, transformed along its rows where the GEMM says so; zeros fill the last block."""
    if gemm.outer is None:
        return a
    return flip(build, site, build(ir.HADAMARD, flip(build, site, a), gemm.outer.n, None, False, val(a).dtype))


def _undo_outer(build: Builder, site: Found, out: Node, gemm: Gemm, rows: Any) -> Node:
    if gemm.outer is None:
        return out
    undone = build(ir.HADAMARD, flip(build, site, out), gemm.outer.n, None, True, val(out).dtype)
    return flip(build, site, build.columns(undone, rows))


def _product(build: Builder, site: Found, role: str, a: Node, b: Node) -> Node:
    common = torch.promote_types(val(a).dtype, val(b).dtype)
    mm = batched.product(build, site, build.cast(a, common), build.cast(b, common))
    return build.cast(keep_as(mm, site.products[role].node), site.dtype_of(role))


def _fprop(state: State, site: Planned, gemm: Gemm) -> RotatedGemm:
    product = site.forward
    build = Builder(state.gm.graph, like=product.node, before=product.node, backward=False)
    signs = signs_of(state, build, site, "fprop", gemm.rotation) if gemm.rotation else None
    a = rotated(build, _outer(build, site, _normal(state, build, site, site.x), gemm), gemm.rotation, signs)
    b = rotated(build, _normal(state, build, site, site.w), gemm.rotation, signs)
    mm = _product(build, site, "fprop", a, b)
    out = restored(build, site, _undo_outer(build, site, mm, gemm, site.m), product.flipped)
    state.replace(product.node, added(build, out, product.node))
    return RotatedGemm(gemm, a, b, mm)


def _backward(state: State, site: Planned, role: str, gemm: Gemm, forward: RotatedGemm | None) -> RotatedGemm:
    product = site.gradients[role]
    build = Builder(state.gm.graph, like=product.node, before=product.node, backward=is_backward(product.node))
    e = _normal(state, build, site, product.e)
    rotation = gemm.rotation
    saved = forward if gemm.b.source == "saved" else None
    if saved is not None:
        source = state.current(saved.b if role == "dgrad" else saved.a)
    else:
        source = _normal(state, build, site, site.w if role == "dgrad" else site.x)
    signs = signs_of(state, build, site, role, rotation) if rotation else None
    a = rotated(build, _outer(build, site, e if role == "dgrad" else flip(build, site, e), gemm), rotation, signs)
    across = flip(build, site, source)
    start = None if saved is None else Start(source, reader=list(source.users)[-1])
    b = rotated(build, across, rotation, signs)
    mm = _product(build, site, role, a, b)
    out = _undo_outer(build, site, mm, gemm, site.dims(role)[0])
    if saved is not None:
        out = undone(build, out, saved, source, site.dtype_of(role))
    out = added(build, restored(build, site, build.columns(out, site.k), product.flipped), product.node)
    state.replace(product.node, out)
    return RotatedGemm(gemm, a, b, mm, start)


def undone(build: Builder, out: Node, forward: RotatedGemm, source: Node, dtype: torch.dtype) -> Node:
    """A gradient without the rotation of fprop, which ``source``, the operand that it was made from, still has."""
    if forward.gemm.rotation is None:
        return out
    return build(ir.HADAMARD, out, forward.gemm.rotation.n, Hadamard.of(source).signs, True, dtype)
