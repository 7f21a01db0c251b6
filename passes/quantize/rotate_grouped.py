"""Write the planned grouped products as A · Bᵀ in the rotated basis, in a layout where every group starts afresh.

X and E get their groups padded to a multiple of the tokens that the recipe's blocks, rotations and tiles need, so that
none of them holds tokens of two groups; the rows of Y and gX that belong to tokens are taken out again. Rows of tokens
in no group are zeros throughout, whatever their operands hold. The weights are matrices below each other,
``[E·out, in]``, each padded to a multiple of the rows that a tile takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
from quartet.passes.graph_pass import graph_pass
from quartet.passes.quantize.rotate import rotated, signs_of, undone
from quartet.passes.rewriting import normal
from quartet.passes.sites import Groups, Planned, Rotated, RotatedGemm, Start
from quartet.passes.state import State

BACKWARD: tuple[str, ...] = ("dgrad", "wgrad")


@graph_pass(reads=Planned, writes=Rotated,
            summary="the same for grouped products, in a layout where every group starts afresh")
def rotate_grouped(state: State) -> None:
    """Rewrite every active GEMM of the planned grouped sites."""
    with editing(state.gm):
        for site in state.at(Planned):
            planned = {role: gemm for role in site.products if (gemm := site.active(role)) is not None}
            if site.groups is None or not planned:
                continue
            layout = _lay_out(state, site, site.groups, planned)
            gemms: dict[str, RotatedGemm] = {}
            if "fprop" in planned:
                gemms["fprop"] = _fprop(state, site, layout, planned["fprop"])
            backward = {role: planned[role] for role in BACKWARD if role in planned}
            gemms |= _gradients(state, site, layout, backward, gemms.get("fprop"))
            padded = f", each padded to a multiple of {layout.multiple} tokens" if layout.multiple > 1 else ""
            site = site.note(f"{layout.count} groups{padded}")
            state.advance(Rotated(**vars(site), gemms=gemms, ends=layout.ends))


@dataclass(frozen=True)
class _Layout:
    """The padded layout of ``count`` groups.

    Attributes:
        multiple: of which each has so many tokens. ends: where each ends.
        source: the token in each row. place: each token's row.
        x: X in it.
    """

    count: Any
    multiple: int
    ends: Node
    source: Node
    place: Node
    x: Node


def multiple_of(gemms: Mapping[str, Gemm]) -> int:
    """Tokens that a group is padded to a multiple of; all that ask for one ask for a power of two."""
    wanted = [1]
    for role, gemm in gemms.items():
        if gemm.outer is not None and role != "wgrad":
            wanted.append(gemm.outer.n)
        if gemm.a.spec is not None and gemm.a.spec.tile and role != "wgrad":
            wanted.append(gemm.a.spec.block)
        if role == "wgrad":
            wanted += [ALIGN] if gemm.a.spec is not None else []
            wanted += [operand.spec.multiple for operand in (gemm.a, gemm.b) if operand.spec is not None]
            wanted += [gemm.rotation.n] if gemm.rotation is not None else []
    return max(wanted)


def _lay_out(state: State, site: Planned, groups: Groups, gemms: Mapping[str, Gemm]) -> _Layout:
    """The padded layout, and X in it."""
    forward = site.forward.node
    build = Builder(state.gm.graph, like=forward, before=forward, backward=False)
    multiple = multiple_of(gemms)
    made = build(GROUP_LAYOUT, state.current(groups.offs), multiple, build.size(site.m))
    ends, source, place = (build.item(made, i) for i in range(3))
    x = build(PAD_GROUPS, state.current(site.x[0]), source)
    x.meta.setdefault("recompute", CheckpointPolicy.PREFER_RECOMPUTE)
    return _Layout(groups.count, multiple, ends, source, place, x)


def _weights(state: State, build: Builder, site: Planned, across: bool) -> Node:
    """``[E·out, in]``, or ``[E·in, out]`` when ``across``."""
    w = state.current(site.w[0])
    return flat(build, build(aten.permute.default, w, SWAP) if site.w[1] != across else w)


def _tiled(build: Builder, layout: _Layout, b: Node, gemm: Gemm) -> Node:
    """Weights with each matrix padded to whole tiles."""
    if gemm.b.spec is None or not gemm.b.spec.tile:
        return b
    each = stacked(build, layout.count, b)
    missing = -shape(each)[1] % gemm.b.spec.block
    return flat(build, build(aten.constant_pad_nd.default, each, [0, 0, 0, missing])) if missing else b


def _product(build: Builder, site: Planned, layout: _Layout, role: str, a: Node, b: Node) -> Node:
    common = torch.promote_types(val(a).dtype, val(b).dtype)
    mm = build(GROUPED_MM, build.cast(a, common), build.cast(b, common), layout.ends, role == "wgrad")
    return build.cast(keep_as(mm, site.products[role].node), site.dtype)


def _across_rows(build: Builder, x: Node, n: int, inverse: bool, rows: Any) -> Node:
    """The outer rotation of a matrix along its rows."""
    turned = build(ir.HADAMARD, build.transpose(x), n, None, inverse, val(x).dtype)
    return build.transpose(turned if rows is None else build.columns(turned, rows))


def _outer(build: Builder, a: Node, gemm: Gemm) -> Node:
    return a if gemm.outer is None else _across_rows(build, a, gemm.outer.n, False, None)


def _undo_outer(build: Builder, site: Planned, layout: _Layout, role: str, out: Node, gemm: Gemm) -> Node:
    if gemm.outer is None:
        return out
    if role != "wgrad":
        return _across_rows(build, out, gemm.outer.n, True, shape(out)[0])
    undone = build(ir.HADAMARD, turned(build, layout.count, out), gemm.outer.n, None, True, val(out).dtype)
    return turned(build, layout.count, build.columns(undone, site.n))


def _fprop(state: State, site: Planned, layout: _Layout, gemm: Gemm) -> RotatedGemm:
    product = site.forward
    build = Builder(state.gm.graph, like=product.node, before=product.node, backward=False)
    signs = signs_of(state, build, site, "fprop", gemm.rotation) if gemm.rotation else None
    a = rotated(build, _outer(build, layout.x, gemm), gemm.rotation, signs)
    b = rotated(build, _tiled(build, layout, _weights(state, build, site, False), gemm), gemm.rotation, signs)
    mm = _product(build, site, layout, "fprop", a, b)
    out = _undo_outer(build, site, layout, "fprop", mm, gemm)
    state.replace(product.node, build(GATHER_ROWS, build.columns(out, site.n), layout.place))
    return RotatedGemm(gemm, a, b, mm)


def _gradients(state: State, site: Planned, layout: _Layout, gemms: Mapping[str, Gemm],
               forward: RotatedGemm | None) -> dict[str, RotatedGemm]:
    """The backward products, which read E in the padded layout."""
    if not gemms:
        return {}
    first = min((site.gradients[role] for role in gemms), key=lambda gradient: gradient.node)
    build = Builder(state.gm.graph, like=first.node, before=first.node, backward=True)
    e = build(PAD_GROUPS, normal(state, build, first.e), layout.source)
    return {role: _backward(state, site, layout, role, gemm, e, forward) for role, gemm in gemms.items()}


def _backward(state: State, site: Planned, layout: _Layout, role: str, gemm: Gemm, e: Node,
              forward: RotatedGemm | None) -> RotatedGemm:
    product, weights = site.gradients[role], role == "dgrad"
    build = Builder(state.gm.graph, like=product.node, before=product.node, backward=True)
    saved, start = forward if gemm.b.source == "saved" else None, None
    if saved is not None:
        source = state.current(saved.b if weights else saved.a)
        across = turned(build, layout.count, source) if weights else build.transpose(source)
        start = Start(source, reader=list(source.users)[-1])
        if weights:
            across = build.columns(across, site.n)
    else:
        across = _weights(state, build, site, True) if weights else build.transpose(layout.x)
    signs = signs_of(state, build, site, role, gemm.rotation) if gemm.rotation else None
    a = rotated(build, _outer(build, e if weights else build.transpose(e), gemm), gemm.rotation, signs)
    b = rotated(build, _tiled(build, layout, across, gemm) if weights else across, gemm.rotation, signs)
    mm = _product(build, site, layout, role, a, b)
    out = _undo_outer(build, site, layout, role, mm, gemm)
    if saved is not None:
        out = undone(build, out, saved, source, site.dtype)
    out = build.columns(out, site.k)
    out = build(GATHER_ROWS, out, layout.place) if weights else _experts(build, layout, out, product.flipped)
    state.replace(product.node, out)
    return RotatedGemm(gemm, a, b, mm, start)


def _experts(build: Builder, layout: _Layout, out: Node, flipped: bool) -> Node:
    """Gradients of weights as the model's stack of matrices."""
    out = stacked(build, layout.count, out)
    return build.contiguous(build(aten.permute.default, out, SWAP)) if flipped else out
