"""Which nodes hold the same values, whatever node computes them.

The backward of a custom Function takes views and casts of what forward had anew, or computes it again.
"""

from __future__ import annotations

import operator
from itertools import count
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from quartet.lowering.ir.graph import arguments, aten, remaining, shape, source, val
from quartet.runtime.compat import OpOverload
from quartet.runtime.view_ops import CAST, COPIES, ORDERS, RESHAPES

_RANDOM = torch.Tag.nondeterministic_seeded


class Values:
    """Node → a number that nodes share whose values are known to be equal element for element."""

    def __init__(self, graph: Graph) -> None:
        self._known: dict[Any, int] = {}
        self._shaped: dict[int, tuple[int, str]] = {}  # of a reshaped tensor: what it was, and its first shape
        self._ordered: dict[int, tuple[int, tuple[int, ...]]] = {}  # of a permuted one: what it was, the order
        self._next = count()
        self._of: dict[Node, int] = {}
        for node in graph.nodes:
            self._of[node] = self._number(node)

    def __getitem__(self, node: Node) -> int:
        return self._of[node]

    def matrix(self, node: Node) -> tuple[int, bool]:
        """The number of a matrix, or of a batch of them, or of what it is the transpose of; whether it is that."""
        base, order = self._ordered.get(self[node], (self[node], ()))
        return (base, True) if order in ((1, 0), (0, 2, 1)) else (self[node], False)

    def _number(self, node: Node) -> int:
        above = source(node)
        if above is None or not hasattr(node.meta.get("val"), "shape"):
            return self._named(node)
        held = self._of[above]
        if node.target in COPIES:
            return held
        if node.target in RESHAPES:
            return self._reshaped(held, str(shape(above)), str(shape(node)))
        if node.target in ORDERS:
            return self._permuted(held, _order(node, len(shape(above))))
        if node.target is CAST:
            return self._cast(held, node)
        return self._named(node)

    def _named(self, node: Node) -> int:
        """A number of its own, or that of an equal call."""
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            return self._key(("size", str(value)))
        if node.op != "call_function" or not _repeatable(node.target):
            return next(self._next)
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: _Number(self._of[n]))
        return self._called(node.target, args, getattr(value, "dtype", None), kwargs)

    def _called(self, target: Any, args: Any, dtype: Any, kwargs: Any = None) -> int:
        return self._key((str(target), str(tuple(args)), str(kwargs or {}), dtype))

    def _cast(self, held: int, node: Node) -> int:
        """Casts commute with views."""
        if held in self._ordered:
            base, order = self._ordered[held]
            return self._permuted(self._cast(base, node), order)
        if held in self._shaped:
            base, first = self._shaped[held]
            return self._reshaped(self._cast(base, node), first, str(shape(node)))
        return self._called(CAST, (_Number(held), *remaining(node)), val(node).dtype)

    def _key(self, key: Any) -> int:
        if key not in self._known:
            self._known[key] = next(self._next)
        return self._known[key]

    def _reshaped(self, held: int, before: str, after: str) -> int:
        base, first = self._shaped.get(held, (held, before))
        if after == first:
            return base
        number = self._key(("reshape", base, after))
        self._shaped[number] = base, first
        return number

    def _permuted(self, held: int, order: tuple[int, ...]) -> int:
        base, earlier = self._ordered.get(held, (held, tuple(range(len(order)))))
        total = tuple(earlier[axis] for axis in order)
        if total == tuple(range(len(order))):
            return base
        number = self._key(("permute", base, total))
        self._ordered[number] = base, total
        return number


class _Number(int):
    """Stands for a node in the text of a call, where no argument of its own looks like it."""

    def __repr__(self) -> str:
        return f"%{int(self)}"


def _order(node: Node, rank: int) -> tuple[int, ...]:
    given = arguments(node)
    if node.target is aten.permute.default:
        return tuple(axis % rank for axis in given["dims"])
    order = list(range(rank))
    a, b = (0, rank - 1) if node.target is aten.t.default else (given["dim0"] % rank, given["dim1"] % rank)
    order[a], order[b] = order[b], order[a]
    return tuple(order)


def _repeatable(target: Any) -> bool:
    """Whether a call with equal arguments gives equal values."""
    if isinstance(target, OpOverload):
        return not str(target).startswith("aten.empty") and _RANDOM not in target.tags and not target._schema.is_mutable
    return getattr(operator, getattr(target, "__name__", ""), None) is target
