"""How X, W and E of a site lie as the 2-D tensors that quantisers read, and the results of its products go back.

    one matrix       as it is
    a batch          [batch, rows, cols] as [batch·rows, cols]: the matrices lie below each other
    groups           tokens padded so that every group starts afresh, the matrices of W below each other
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from torch.fx import Node
from torch.utils.checkpoint import CheckpointPolicy

from quartet.lowering.ir.graph import Builder, aten, shape
from quartet.lowering.ir.operands import Kind
from quartet.lowering.ir.ops.grouped import ENDS, GATHER_ROWS, GROUP_LAYOUT, PAD_GROUPS, PLACE, SOURCE
from quartet.lowering.ir.products import SWAP, flat, stacked, turned
from quartet.lowering.recipe.types import Gemm
from quartet.passes.matrices import Operand
from quartet.passes.rewriting import normal
from quartet.passes.sites import Groups, Planned
from quartet.passes.state import State


class Layout:
    """A matrix each, or a batch of them.

    Args:
        gemms: role → the products to quantise.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, state: State, site: Planned, gemms: Mapping[str, Gemm]) -> None:
        self.state, self.site, self.gemms = state, site, gemms

    def kind(self, role: str) -> Kind:
        """What the product of a role is."""
        return Kind(self.site.batch)

    def x(self, build: Builder) -> Node:
        """X with a row a token."""
        return self._normal(build, self.site.x)

    def w(self, build: Builder) -> Node:
        """W with a row an output feature, as operand b of fprop."""
        return self._normal(build, self.site.w)

    def e(self, build: Builder, role: str) -> Node:
        """E with a row a token."""
        return self._normal(build, self.site.gradients[role].e)

    def origin(self, build: Builder, role: str, kept: Node | None) -> Node:
        """What operand b of a gradient is the transpose of: what forward keeps, or else W or X."""
        return kept if kept is not None else self.w(build) if role == "dgrad" else self.x(build)

    def across(self, build: Builder, role: str, origin: Node) -> Node:
        """Operand b of a gradient from its :meth:`origin`."""
        return self.flip(build, origin)

    def flip(self, build: Builder, x: Node) -> Node:
        """The transpose of X, E or a matrix in their place, of every matrix of a batch."""
        return build.transpose(x) if self.site.batch is None else turned(build, self.site.batch, x)

    def flip_result(self, build: Builder, role: str, out: Node) -> Node:
        """The transpose of a product."""
        return self.flip(build, out)

    def rows(self, role: str, out: Node) -> Any:
        """The rows of a product without what operand a is padded with for a rotation along them."""
        return self.site.dims(role)[0]

    def restored(self, build: Builder, role: str, out: Node) -> Node:
        """A product as the model has it."""
        flipped = self.site.products[role].flipped
        if self.site.batch is None:
            return build.transpose(out) if flipped else out
        return _as_stack(build, self.site.batch, out, flipped)

    def _normal(self, build: Builder, operand: Operand) -> Node:
        node, flipped = self.state.current(operand[0]), operand[1]
        if self.site.batch is None:
            return build.transpose(node) if flipped else node
        return flat(build, build(aten.permute.default, node, SWAP) if flipped else node)


class GroupedLayout(Layout):
    """Tokens in groups, each with a matrix of its own.

    X and E get their groups padded to a multiple of the tokens that the recipe's blocks, rotations and tiles need, so
    that none of them holds tokens of two groups; the rows of Y and gX that belong to tokens are taken out again. Rows
    of tokens in no group are zeros throughout, whatever their operands hold. The matrices of W lie below each other,
    ``[E·out, in]``, each padded to a multiple of the rows that a tile takes.
    """

    def __init__(self, state: State, site: Planned, gemms: Mapping[str, Gemm], groups: Groups) -> None:
        super().__init__(state, site, gemms)
        self.count, multiple = groups.count, multiple_of(gemms, site.decisions["wgrad"].group_align)
        forward = site.forward.node
        build = Builder(forward.graph, like=forward, before=forward, backward=False)
        made = build(GROUP_LAYOUT, state.current(groups.offs), multiple, build.size(site.m))
        self.ends, self.source, self.place = (build.item(made, i) for i in (ENDS, SOURCE, PLACE))
        self.padded_x = build(PAD_GROUPS, state.current(site.x[0]), self.source)
        self.padded_x.meta.setdefault("recompute", CheckpointPolicy.PREFER_RECOMPUTE)
        padded = f", each padded to a multiple of {multiple} tokens" if multiple > 1 else ""
        self.notes = (f"{groups.count} groups{padded}",)

    @cached_property
    def padded_e(self) -> Node:
        """E in the padded layout, the same for dgrad and wgrad."""
        first = min((g for role, g in self.site.gradients.items() if role in self.gemms), key=lambda g: g.node)
        build = Builder(first.node.graph, like=first.node, before=first.node, backward=True)
        return build(PAD_GROUPS, normal(self.state, build, first.e), self.source)

    def kind(self, role: str) -> Kind:
        return Kind(ends=self.ends, over_tokens=role == "wgrad")

    def x(self, build: Builder) -> Node:
        return self.padded_x

    def w(self, build: Builder) -> Node:
        return self._tiled(build, "fprop", self._weights(build, across=False))

    def e(self, build: Builder, role: str) -> Node:
        return self.padded_e

    def origin(self, build: Builder, role: str, kept: Node | None) -> Node:
        """Operand b but for its tiles."""
        if role == "wgrad":
            return build.transpose(self.padded_x if kept is None else kept)
        if kept is None:
            return self._weights(build, across=True)
        return build.columns(turned(build, self.count, kept), self.site.n)

    def across(self, build: Builder, role: str, origin: Node) -> Node:
        return self._tiled(build, role, origin) if role == "dgrad" else origin

    def flip_result(self, build: Builder, role: str, out: Node) -> Node:
        return turned(build, self.count, out) if role == "wgrad" else build.transpose(out)

    def rows(self, role: str, out: Node) -> Any:
        return self.site.n if role == "wgrad" else shape(out)[0]

    def restored(self, build: Builder, role: str, out: Node) -> Node:
        if role == "wgrad":
            return _as_stack(build, self.count, out, self.site.products[role].flipped)
        return build(GATHER_ROWS, out, self.place)

    def _weights(self, build: Builder, across: bool) -> Node:
        """``[E·out, in]``, or ``[E·in, out]`` when ``across``."""
        node, flipped = self.site.w
        w = self.state.current(node)
        return flat(build, build(aten.permute.default, w, SWAP) if flipped != across else w)

    def _tiled(self, build: Builder, role: str, b: Node) -> Node:
        """Weights with each matrix padded to whole tiles."""
        spec = self.gemms[role].b.spec
        if spec is None or not spec.tile:
            return b
        each = stacked(build, self.count, b)
        missing = -shape(each)[1] % spec.block
        return flat(build, build(aten.constant_pad_nd.default, each, [0, 0, 0, missing])) if missing else b


def layout_of(state: State, site: Planned, gemms: Mapping[str, Gemm]) -> Layout:
    """How the matrices of a site lie for the products ``gemms``, by role."""
    return Layout(state, site, gemms) if site.groups is None else GroupedLayout(state, site, gemms, site.groups)


def multiple_of(gemms: Mapping[str, Gemm], contracted: int) -> int:
    """Tokens that a group is padded to a multiple of; all that ask for one ask for a power of two.

    ``contracted``: what the kernel of wgrad asks for.
    """
    wanted = [1]
    for role, gemm in gemms.items():
        if gemm.outer is not None and role != "wgrad":
            wanted.append(gemm.outer.n)
        if gemm.a.spec is not None and gemm.a.spec.tile and role != "wgrad":
            wanted.append(gemm.a.spec.block)
        if role == "wgrad":
            wanted += [contracted, *(spec.multiple for spec in gemm.specs)] if gemm.specs is not None else []
            wanted += [gemm.rotation.n] if gemm.rotation is not None else []
    return max(wanted)


def _as_stack(build: Builder, count: Any, out: Node, flipped: bool) -> Node:
    """``[count, rows, cols]`` of matrices below each other, laid out as what follows a batched product expects it."""
    out = stacked(build, count, out)
    return build.contiguous(build(aten.permute.default, out, SWAP)) if flipped else out
