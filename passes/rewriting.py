"""Write a planned product anew from the operands of its site, with something done to the result."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Node

from quartet.lowering.ir.graph import Builder, aten, is_backward, keep_as, source_of, val
from quartet.passes.matrices import ADDS, Operand
from quartet.passes.sites import Planned
from quartet.passes.state import State


def normal(state: State, build: Builder, operand: Operand, flip: bool = False) -> Node:
    """An operand in normal orientation, or in the other one."""
    node = state.current(operand[0])
    return build.transpose(node) if operand[1] != flip else node


def rewrite(state: State, site: Planned, role: str, finish: Callable[[Builder, Node], Node]) -> Planned:
    """Put ``finish(build, product)`` in place of the product of a role, which is made from the site's operands.

    The product is in normal orientation and without bias, and is what the site that is returned has.
    """
    old, flipped = site.products[role].node, site.products[role].flipped
    build = Builder(state.gm.graph, like=old, before=old, backward=is_backward(old))
    (left, left_flip), (right, right_flip) = _operands(site, role)
    a, b = normal(state, build, left, left_flip), normal(state, build, right, right_flip)
    common = torch.promote_types(val(a).dtype, val(b).dtype)
    mm = keep_as(build(aten.mm.default, build.cast(a, common), build.cast(b, common)), old)
    out = build.cast(finish(build, mm), val(old).dtype)
    if flipped:
        out = build.transpose(out)
    state.replace(old, added(build, out, old))
    return site.with_product(role, mm)


def _operands(site: Planned, role: str) -> tuple[tuple[Operand, bool], tuple[Operand, bool]]:
    """A and B of A·B for a role, and whether each is transposed for it."""
    if role == "fprop":
        return (site.x, False), (site.w, True)
    e = site.gradients[role].e
    return ((e, False), (site.w, False)) if role == "dgrad" else ((e, True), (site.x, False))


def added(build: Builder, out: Node, old: Node) -> Node:
    """``beta·C + alpha·out`` where the product ``old``, of which ``out`` is the bare one, adds to a C."""
    if old.target not in ADDS:
        return out
    beta, alpha = (old.kwargs.get(key, 1) for key in ("beta", "alpha"))
    out = out if alpha == 1 else build(aten.mul.Tensor, out, alpha)
    if beta == 0:
        return out
    c = source_of(old)
    c = c if beta == 1 else build(aten.mul.Tensor, c, beta)
    return build(aten.add.Tensor, out, c)
