"""Recognise ``act(a) · b`` in a graph of aten ops, whoever decomposed it, in any order of the factors.

A product is taken apart into its factors, through casts, views and scalars. An activation is one factor (``silu(a)``)
or two: ``a`` and a gate that is computed from it, ``sigmoid(a)``, ``1 / (1 + exp(-a))``, ``1 + erf(…a)``,
``1 + tanh(…a)``. What remains is the linear branch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from quartet.lowering.ir.graph import argument, arguments, aten, is_backward, shape, source, source_of, val
from quartet.passes.matrices import canonical
from quartet.passes.plan.sharing import value_key
from quartet.passes.sites import Found
from quartet.runtime.sizes import same, same_sizes
from quartet.runtime.view_ops import CAST, COPIES, RESHAPES

_CASTS = COPIES | {CAST, aten._to_copy.default}
_PRODUCTS = (aten.mul.Tensor, aten.mul.Scalar)
_QUOTIENTS = (aten.div.Tensor, aten.div.Scalar)
_ARITHMETIC = (*_CASTS, *RESHAPES, *_PRODUCTS, *_QUOTIENTS, aten.neg.default, aten.exp.default, aten.add.Tensor,
               aten.pow.Tensor_Scalar, aten.sigmoid.default, aten.erf.default, aten.tanh.default)
_WHOLE: dict[Any, str] = {aten.silu.default: "silu", aten.gelu.default: "gelu", aten.relu.default: "relu"}
_GATES: dict[Any, str] = {aten.erf.default: "gelu", aten.tanh.default: "gelu"}
_DEPTH = 12


@dataclass(frozen=True)
class Gated:
    """``X = act(a) · b``.

    Args:
        activation: ``"silu"``, ``"gelu"`` or ``"relu"``.
        linear: node of b, ``[..., channels]`` with its tokens in the order of X.
    """

    activation: str
    linear: Node


@dataclass(frozen=True)
class _Factor:
    """A factor of a product; ``inverse`` when it divides. ``node`` is what is multiplied, ``bare`` its origin."""

    node: Node
    bare: Node
    inverse: bool = False


def gated_activation(site: Found) -> Gated | None:
    """How X of a site is a gated activation, or None."""
    base, flipped = canonical(site.x[0])
    if flipped != site.x[1]:
        return None
    factors = [f for f in _factors(base, False) if val(f.bare).dtype is not torch.bool]  # without dropout's mask
    for factor in factors:
        rest = [f for f in factors if f is not factor]
        if factor.inverse:
            name, inner = ("silu", factor.bare) if _is_one_plus_exp(factor.bare) else (None, factor.bare)
        else:
            name = _activation(factor.bare)
            if name is not None:
                return _linear(name, rest, site)
            name, inner = _gate(factor.bare)
        if name is None:
            continue
        for other in rest:
            if not other.inverse and _reaches(inner, other.bare):
                return _linear(name, [f for f in rest if f is not other], site)
    return None


def _linear(name: str, rest: list[_Factor], site: Found) -> Gated | None:
    if len(rest) != 1 or rest[0].inverse:
        return None
    branch = rest[0]
    linear = _activation(branch.bare) is None and _gate(branch.bare)[0] is None
    return Gated(name, branch.node) if linear and same(shape(branch.node)[-1], site.k) else None


def _bare(node: Node) -> Node:
    """The node behind casts, copies and views that keep the rows and their order."""
    while (above := source(node)) is not None:
        rows = node.target in RESHAPES and same_sizes(shape(above)[-1:], shape(node)[-1:])
        if not (node.target in _CASTS or rows):
            break
        node = above
    return node


def _factors(node: Node, inverse: bool) -> list[_Factor]:
    bare = _bare(node)
    if is_backward(bare):
        return []
    if bare.target in (*_PRODUCTS, *_QUOTIENTS):
        found = []
        for name in ("self", "other"):
            arg = argument(bare, name)
            if _like(arg, bare):  # not a scalar, not a gain per channel
                divides = bare.target in _QUOTIENTS and name == "other"
                found += _factors(arg, inverse != divides)
        return found
    if bare.target is aten.reciprocal.default:
        return _factors(source_of(bare), not inverse)
    return [_Factor(node, bare, inverse)]


def _like(arg: Any, product: Node) -> bool:
    return isinstance(arg, Node) and isinstance(arg.meta.get("val"), torch.Tensor) and (
        same_sizes(shape(arg), shape(product)))


def _activation(node: Node) -> str | None:
    """Name of an activation that is one node."""
    clamped = (aten.clamp_min.default, aten.clamp.default)
    if node.target in clamped and argument(node, "min") == 0 and arguments(node).get("max") is None:
        return "relu"
    return _WHOLE.get(node.target)


def _gate(node: Node) -> tuple[str | None, Node]:
    """(activation, argument) where ``node`` times that argument is an activation."""
    if node.target is aten.sigmoid.default:
        return "silu", node
    if _is_one_plus(node):
        inner = _bare(source_of(node))
        return _GATES.get(inner.target), inner
    return None, node


def _is_one_plus_exp(node: Node) -> bool:
    if not _is_one_plus(node):
        return False
    exp = _bare(source_of(node))
    return exp.target is aten.exp.default and _bare(source_of(exp)).target is aten.neg.default


def _is_one_plus(node: Node) -> bool:
    return node.target is aten.add.Tensor and argument(node, "other") == 1


def _reaches(node: Node, source: Node) -> bool:
    """Whether ``node`` is elementwise arithmetic on ``source``."""
    wanted, frontier, seen = value_key(source), [(node, 0)], set()
    while frontier:
        at, depth = frontier.pop()
        if at in seen:
            continue
        seen.add(at)
        if at is source or value_key(_bare(at)) == wanted:
            return True
        if depth < _DEPTH and at.target in _ARITHMETIC:
            frontier += [(i, depth + 1) for i in at.all_input_nodes]
    return False
