"""Write a planned product anew from the operands of its site, with something done to the result."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Node

from quartet.lowering.ir.graph import Builder, aten, is_backward, keep_as, val
from quartet.passes.sites import MatmulSite
from quartet.passes.state import State
from quartet.passes.views import ADDS


def normal(state: State, build: Builder, operand: tuple[Node, bool] | None, flip: bool = False) -> Node:
    """An operand in normal orientation, or in the other one."""
    assert operand is not None
    node = state.current(operand[0])
    return build.transpose(node) if operand[1] != flip else node


def rewrite(state: State, site: MatmulSite, role: str, finish: Callable[[Builder, Node], Node]) -> None:
    """Put ``finish(build, product)`` in place of the product of a role, which is made from the site's operands.

    The product is in normal orientation and without bias, and is what the site has from then on.
    """
    product = site.products[role]
    old = product.node
    build = Builder(state.gm.graph, like=old, before=old, backward=is_backward(old))
    e, x, w = None if role == "fprop" else site.gradient_of(role), site.x, site.w
    (left, left_flip), (right, right_flip) = {"fprop": ((x, False), (w, True)), "dgrad": ((e, False), (w, False)),
                                              "wgrad": ((e, True), (x, False))}[role]
    a, b = normal(state, build, left, left_flip), normal(state, build, right, right_flip)
    common = torch.promote_types(val(a).dtype, val(b).dtype)
    mm = keep_as(build(aten.mm.default, build.cast(a, common), build.cast(b, common)), old)
    flipped = product.flipped
    product.node, product.flipped = mm, False
    out = build.cast(finish(build, mm), val(old).dtype)
    if flipped:
        out = build.transpose(out)
    state.replace(old, added(build, out, old))


def added(build: Builder, out: Node, old: Node) -> Node:
    """``beta·C + alpha·out`` where the product ``old``, of which ``out`` is the bare one, adds to a C."""
    if old.target not in ADDS:
        return out
    beta, alpha = (old.kwargs.get(key, 1) for key in ("beta", "alpha"))
    out = out if alpha == 1 else build(aten.mul.Tensor, out, alpha)
    if beta == 0:
        return out
    c = old.args[0] if beta == 1 else build(aten.mul.Tensor, old.args[0], beta)
    return build(aten.add.Tensor, out, c)
