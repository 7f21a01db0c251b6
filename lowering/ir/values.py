"""The fake results of calls, of equal calls made once.

A model's layers are alike, and so are nearly all calls of our ops in its graph. Their results are new tensors that
depend on the layout of arguments alone; PyTorch keeps such results for its own operators, and works others out anew.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch

from quartet.lowering.ir.op import op_of
from quartet.runtime.compat import OpOverload

_known: WeakKeyDictionary[Any, dict[Hashable, Any]] = WeakKeyDictionary()  # of each fake mode


@dataclass(frozen=True)
class Layout:
    """What of a tensor the layouts of results can depend on, all sizes being known."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def value_of(mode: Any, target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What ``target`` gives for fake tensors of a mode."""
    key = described((target, *args, *kwargs.items())) if _makes_new(target) else None
    with mode:
        if key is None:
            return target(*args, **kwargs)
        known = _known.setdefault(mode, {})
        if key in known:
            return undescribed(known[key], _empty)
        result = target(*args, **kwargs)
        if (layouts := described(result)) is not None:
            known[key] = layouts
        return result


@cache
def _makes_new(target: Any) -> bool:
    """Whether the results of a call are tensors of their own, and that is all it does."""
    return op_of(target) is not None and not target._schema.is_mutable and all(
        result.alias_info is None and "Tensor" in str(result.type) for result in target._schema.returns)


def described(value: Any) -> Any:
    """Arguments or results without what makes no difference to layouts; None where a size is symbolic, or unknown what
    makes a difference."""
    if isinstance(value, torch.Tensor):
        shape, strides = tuple(value.shape), value.stride()
        static = all(type(size) is int for size in (*shape, *strides))
        return Layout(shape, strides, value.dtype, value.device) if static else None
    if isinstance(value, list | tuple):
        parts = tuple(map(described, value))
        return None if None in parts else (type(value), parts)
    plain = value is None or isinstance(value, int | float | str | torch.dtype | torch.device | OpOverload)
    return (type(value), value) if plain else None


def undescribed(value: Any, tensor: Callable[[Layout], torch.Tensor]) -> Any:
    """What is :func:`described`, with tensors that ``tensor`` makes."""
    if isinstance(value, Layout):
        return tensor(value)
    kind, inside = value
    return kind(undescribed(part, tensor) for part in inside) if issubclass(kind, list | tuple) else inside


def _empty(layout: Layout) -> torch.Tensor:
    return torch.empty_strided(layout.shape, layout.strides, dtype=layout.dtype, device=layout.device)
