"""Which sites quantise the same X."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch.fx import Node

from quartet.lowering.ir.graph import remaining, shape, source
from quartet.passes.sites import Planned
from quartet.passes.state import State
from quartet.runtime.view_ops import PASSED_ON


def group(state: State) -> None:
    """Find the sites that quantise the same X."""
    groups: dict[Any, int] = {}
    for site in state.at(Planned):
        key = (value_key(site.x[0]), site.x[1], str(site.batch), site.groups and site.groups.offs, site.recipe.fprop,
               site.recipe.wgrad)
        state.advance(replace(site, x_group=groups.setdefault(key, site.index)))


def value_key(node: Node) -> Any:
    """Equal for nodes that are the same view or cast of the same node."""
    shown = source(node) if node.target in PASSED_ON else None
    if shown is not None:
        size = str(shape(node)) if _tensor(node) else ""
        return (str(node.target), value_key(shown), str(remaining(node)), size)
    return node


def _tensor(node: Node) -> bool:
    return hasattr(node.meta.get("val"), "shape")
