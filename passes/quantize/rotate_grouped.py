"""Write the planned grouped products as A · Bᵀ in the rotated basis, in a layout where every group starts afresh.

X and E get their groups padded to a multiple of the tokens that the recipe's blocks, rotations and tiles need, so that
none of them holds tokens of two groups; the rows of Y and gX that belong to tokens are taken out again. Rows of tokens
in no group are zeros throughout, whatever their operands hold. The weights are matrices below each other,
``[E·out, in]``, each padded to a multiple of the rows that a tile takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node
from torch.utils.checkpoint import CheckpointPolicy

from quartet.lowering import ir
from quartet.lowering.ir.graph import Builder, aten, editing, keep_as, shape, val
from quartet.lowering.ir.grouped import GATHER_ROWS, GROUP_LAYOUT, GROUPED_MM, PAD_GROUPS
from quartet.lowering.ir.products import SWAP, flat, stacked, turned
from quartet.lowering.recipe.types import Gemm
from quartet.lowering.targets.fp8_products import ALIGN
from quartet.passes.quantize.rotate import rotated, signs_of
from quartet.passes.sites import Groups, MatmulSite
from quartet.passes.state import State, recipe_of
from quartet.runtime.sizes import same_sizes


def rotate_grouped(state: State) -> None:
    """Rewrite every active GEMM of the planned grouped sites."""
    with editing(state.gm):
        for site in state.planned():
            if site.groups is None:
                continue
            roles = [role for role in site.products if site.active(role)]
            if roles:
                _lay_out(state, site, site.groups, roles)
            if "fprop" in roles:
                _fprop(state, site, site.groups)
            for role in ("dgrad", "wgrad"):
                if role in roles:
                    _backward(state, site, site.groups, role)


def multiple_of(site: MatmulSite, roles: list[str]) -> int:
    """Tokens that a group is padded to a multiple of; all that ask for one ask for a power of two."""
    wanted = [1]
    for role in roles:
        gemm = site.active(role)
        assert gemm is not None
        if gemm.outer is not None and role != "wgrad":
            wanted.append(gemm.outer.n)
        if gemm.a.spec is not None and gemm.a.spec.tile and role != "wgrad":
            wanted.append(gemm.a.spec.block)
        if role == "wgrad":
            wanted += [ALIGN] if gemm.a.spec is not None else []
            wanted += [operand.spec.multiple for operand in (gemm.a, gemm.b) if operand.spec is not None]
            wanted += [gemm.rotation.n] if gemm.rotation is not None else []
    return max(wanted)


def _lay_out(state: State, site: MatmulSite, groups: Groups, roles: list[str]) -> None:
    """The padded layout, and X and E in it."""
    forward = site.products["fprop"].node
    build = Builder(state.gm.graph, like=forward, before=forward, backward=False)
    multiple = multiple_of(site, roles)
    made = build(GROUP_LAYOUT, state.current(groups.offs), multiple, build.size(site.m))
    groups.ends, source, groups.place = (build.item(made, i) for i in range(3))
    site.notes += (f"{groups.count} groups" + (f", each padded to a multiple of {multiple} tokens" * (multiple > 1)),)
    if "fprop" in roles or "wgrad" in roles:
        groups.x = build(PAD_GROUPS, state.current(site.x[0]), source)
        groups.x.meta.setdefault("recompute", CheckpointPolicy.PREFER_RECOMPUTE)
    if "dgrad" in roles or "wgrad" in roles:
        first = min(site.products[role].node for role in ("dgrad", "wgrad") if role in roles)
        build = Builder(state.gm.graph, like=first, before=first, backward=True)
        assert site.gradient is not None
        e = state.current(site.gradient[0])
        groups.e = build(PAD_GROUPS, build.transpose(e) if site.gradient[1] else e, source)


def _weights(state: State, build: Builder, site: MatmulSite, across: bool) -> Node:
    """``[E·out, in]``, or ``[E·in, out]`` when ``across``."""
    w = state.current(site.w[0])
    return flat(build, build(aten.permute.default, w, SWAP) if site.w[1] != across else w)


def _tiled(build: Builder, groups: Groups, b: Node, gemm: Gemm) -> Node:
    """Weights with each matrix padded to whole tiles."""
    if gemm.b.spec is None or not gemm.b.spec.tile:
        return b
    each = stacked(build, groups.count, b)
    missing = -shape(each)[1] % gemm.b.spec.block
    return flat(build, build(aten.constant_pad_nd.default, each, [0, 0, 0, missing])) if missing else b


def _product(build: Builder, site: MatmulSite, groups: Groups, role: str, a: Node, b: Node) -> Node:
    product = site.products[role]
    common = torch.promote_types(val(a).dtype, val(b).dtype)
    mm = build(GROUPED_MM, build.cast(a, common), build.cast(b, common), groups.ends, role == "wgrad")
    product.a, product.b, product.mm = a, b, build.cast(keep_as(mm, product.node), site.dtype)
    return product.mm


def _across_rows(build: Builder, gemm: Gemm, a: Node, inverse: bool, rows: Any) -> Node:
    """The outer rotation of a matrix along its rows."""
    assert gemm.outer is not None
    turned = build(ir.HADAMARD, build.transpose(a), gemm.outer.n, None, inverse, val(a).dtype)
    return build.transpose(turned if rows is None else build.columns(turned, rows))


def _outer(build: Builder, a: Node, gemm: Gemm) -> Node:
    return a if gemm.outer is None else _across_rows(build, gemm, a, False, None)


def _undo_outer(build: Builder, site: MatmulSite, groups: Groups, role: str, out: Node, gemm: Gemm) -> Node:
    if gemm.outer is None:
        return out
    if role != "wgrad":
        return _across_rows(build, gemm, out, True, shape(out)[0])
    undone = build(ir.HADAMARD, turned(build, groups.count, out), gemm.outer.n, None, True, val(out).dtype)
    return turned(build, groups.count, build.columns(undone, site.n))


def _fprop(state: State, site: MatmulSite, groups: Groups) -> None:
    product, gemm = site.products["fprop"], recipe_of(site).fprop
    assert gemm is not None and groups.x is not None
    build = Builder(state.gm.graph, like=product.node, before=product.node, backward=False)
    signs = signs_of(state, build, site, "fprop", gemm.rotation) if gemm.rotation else None
    a = rotated(build, _outer(build, groups.x, gemm), gemm.rotation, signs)
    b = rotated(build, _tiled(build, groups, _weights(state, build, site, False), gemm), gemm.rotation, signs)
    out = _undo_outer(build, site, groups, "fprop", _product(build, site, groups, "fprop", a, b), gemm)
    state.replace(product.node, build(GATHER_ROWS, build.columns(out, site.n), groups.place))


def _backward(state: State, site: MatmulSite, groups: Groups, role: str) -> None:
    product, recipe = site.products[role], recipe_of(site)
    gemm, forward = getattr(recipe, role), recipe.fprop
    build = Builder(state.gm.graph, like=product.node, before=product.node, backward=True)
    rotation, undo = gemm.rotation, None
    weights = role == "dgrad"
    if gemm.b.source == "saved":
        made = site.products["fprop"]
        kept = made.b if weights else made.a
        assert kept is not None
        source = product.source = state.current(kept)
        undo = forward.rotation if forward is not None else None
        across = turned(build, groups.count, source) if weights else build.transpose(source)
        product.reader = list(source.users)[-1]
        if weights:
            across = build.columns(across, site.n)
    elif weights:
        across = _weights(state, build, site, True)
    else:
        assert groups.x is not None
        across = build.transpose(groups.x)
    assert groups.e is not None
    signs = signs_of(state, build, site, role, rotation) if rotation else None
    a = rotated(build, _outer(build, groups.e if weights else build.transpose(groups.e), gemm), rotation, signs)
    b = rotated(build, _tiled(build, groups, across, gemm) if weights else across, rotation, signs)
    out = _undo_outer(build, site, groups, role, _product(build, site, groups, role, a, b), gemm)
    if undo is not None:
        assert source.target is ir.HADAMARD
        out = build(ir.HADAMARD, out, undo.n, source.args[2], True, site.dtype)
    out = build.columns(out, site.k)
    out = build(GATHER_ROWS, out, groups.place) if weights else _experts(build, groups, out, product.flipped)
    assert same_sizes(shape(out), shape(product.node)), (shape(out), shape(product.node))
    state.replace(product.node, out)


def _experts(build: Builder, groups: Groups, out: Node, flipped: bool) -> Node:
    """Gradients of weights as the model's stack of matrices."""
    out = stacked(build, groups.count, out)
    return build.contiguous(build(aten.permute.default, out, SWAP)) if flipped else out
