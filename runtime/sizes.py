"""Sizes of tensors that may be symbolic: whether two are equal, and what they likely are. No guard is installed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from quartet.runtime.compat import known_symbols, statically_known_true, unbacked_size


def same(a: Any, b: Any) -> bool:
    """Whether two sizes (int or SymInt) are known to be equal, however each is written."""
    return a is b or bool(statically_known_true(a == b))


def same_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes, or two lists of strides, are known to be equal."""
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def unbacked(size: Any) -> bool:
    """Whether only the data decides a size: it had no value when the graph was captured."""
    return isinstance(size, torch.SymInt) and size.node.hint is None


def hint(size: Any, instead: int | None = None) -> int:
    """A size as a number: a symbolic one as it was when the graph was captured.

    ``instead`` stands for each symbol that only the data decides; by default what Inductor assumes of one.
    """
    if not isinstance(size, torch.SymInt):
        return int(size)
    if not unbacked(size):
        return int(size.node.hint)
    values = known_symbols(size.node.shape_env)
    assumed = unbacked_size() if instead is None else instead
    return int(size.node.expr.xreplace({s: values.get(s, assumed) for s in size.node.expr.free_symbols}))
