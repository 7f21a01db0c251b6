"""Smooth-SwiGLU (arXiv 2409.12517): take the range of the linear branch out of X = act(a) · b before it is quantised.

s is a power of two from the largest magnitudes of b, of each channel or of each token; it is not differentiated.

    per channel (the paper)               X' = X·s    W' = W·(1/s)    scaled by columns
        Y = X'·W'ᵀ      gX = (E·W')·s      gW = (Eᵀ·X')·(1/s)
    per token (the released code)         X' = s·X    E' = (1/s)·E    scaled by rows
        Y = (1/s)·(X'·Wᵀ)      gX = s·(E'·W)      gW = E'ᵀ·X'

Multiplying by powers of two is exact, so the function and its gradients are the same bit for bit until something is
quantised. Products that stay in the model's dtype are not touched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from quartet.kernels.reference.products.smooth import smooth_scale
from quartet.lowering.ir.graph import Builder, aten, editing, inline, is_backward, val
from quartet.passes.graph_pass import graph_pass
from quartet.passes.matrices import Operand
from quartet.passes.recipe.gated import Gated, gated_activation
from quartet.passes.rewriting import normal, rewrite
from quartet.passes.sites import MADE_KEY, Planned
from quartet.passes.state import State
from quartet.runtime import compat


@dataclass(frozen=True)
class _Smoothed:
    """X' ``[tokens, in]``, s and 1/s (fp32, ``[1, in]`` or ``[tokens, 1]``)."""

    x: Node
    scale: Node
    inverse: Node


@graph_pass(reads=Planned, writes=Planned, optional=True,
            summary="the range of a gated activation's linear branch goes into the weight or the output")
def smooth_swiglu(state: State) -> None:
    """Scale the operands of the planned sites that ask for it and whose X is a gated activation."""
    shared: dict[Any, _Smoothed] = {}
    with editing(state.gm):
        for site in state.at(Planned):
            form = site.recipe.smooth
            gated = gated_activation(site) if form != "none" else None
            if gated is None:
                continue
            if site.batch is not None or site.groups is not None:
                state.advance(site.remark("fprop", "not smoothed: W is not one matrix"))
                continue
            node = site.forward.node
            roles = [role for role in site.products if site.active(role)]
            if form == "token" and "wgrad" not in roles:
                roles = [role for role in roles if role == "fprop"]  # dgrad = E·W has nothing of X
            if not roles:
                continue
            key = site.x_group, form, str(node.meta.get("recompute")), node.meta.get("ac_graph_id")
            if key not in shared:
                shared[key] = _smoothed_x(state, site, gated, form)
            site, factors = _scale_operands(state, site, form, shared[key], roles)
            for role in roles:
                site = rewrite(state, site, role, _finish(factors[role]))
                site = site.remark(role, f"smoothed per {form} ({gated.activation})")
            state.advance(site)


def _smoothed_x(state: State, site: Planned, gated: Gated, form: str) -> _Smoothed:
    node = site.forward.node
    build = Builder(state.gm.graph, like=node, before=node, backward=False)

    def scales(b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return smooth_scale(b, form)

    scale, inverse = inline(build, compat.trace(scales, [val(gated.linear)]), [gated.linear])
    return _Smoothed(_operand(build, normal(state, build, site.x), scale, form), scale, inverse)


def _scale_operands(state: State, site: Planned, form: str, smoothed: _Smoothed,
                    roles: list[str]) -> tuple[Planned, dict[str, Node | None]]:
    """The site with its scaled operands, and the factor of each role's product."""
    forward = site.forward.node
    build = Builder(state.gm.graph, like=forward, before=forward, backward=False)
    scaled = replace(site, x=(smoothed.x, False))
    if form == "channel":
        w = _operand(build, normal(state, build, site.w), smoothed.inverse, form)
        return replace(scaled, w=(w, False)), {"fprop": None, "dgrad": smoothed.scale, "wgrad": smoothed.inverse}
    if "wgrad" in roles:
        scaled = _smooth_gradients(state, scaled, smoothed)
    return scaled, {"fprop": smoothed.inverse, "dgrad": smoothed.scale, "wgrad": None}


def _smooth_gradients(state: State, site: Planned, smoothed: _Smoothed) -> Planned:
    """The site whose backward products read the scaled E, made once where they have the same."""
    made: dict[Operand, Operand] = {}
    for role, gradient in sorted(site.gradients.items(), key=lambda item: item[1].node):
        if gradient.e not in made:
            build = Builder(state.gm.graph, gradient.node, gradient.node, backward=is_backward(gradient.node))
            made[gradient.e] = _operand(build, normal(state, build, gradient.e), smoothed.inverse, "token"), False
        site = site.with_gradient(role, replace(gradient, e=made[gradient.e]))
    return site


def _finish(factor: Node | None) -> Callable[[Builder, Node], Node]:
    return lambda build, product: product if factor is None else _times(build, product, factor)


def _operand(build: Builder, x: Node, factor: Node, form: str) -> Node:
    """``x · factor``, an operand that is not what its name says any more."""
    made = _times(build, x, factor)
    made.meta[MADE_KEY] = f"smooth-{form}"
    return made


def _times(build: Builder, x: Node, factor: Node) -> Node:
    """``x · factor`` in the dtype of x; from float16 in float32, where the result stays."""
    dtype = torch.float32 if val(x).dtype is torch.float16 else val(x).dtype
    return build(aten.mul.Tensor, build.cast(x, dtype), build.cast(factor, dtype))
