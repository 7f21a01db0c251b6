"""What flows through the pipeline: the graph, what is known of the compilation, the sites found so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from quartet.lowering.ir.graph import replace_all
from quartet.lowering.recipe.records import MatmulRecord
from quartet.lowering.recipe.types import Recipe
from quartet.passes.compilation import Compilation
from quartet.passes.flow import Flow
from quartet.passes.sites import MatmulSite

STREAM_STRIDE = 0x1E3779B97F4A7C15  # odd, so that streams differ in every bit position


@dataclass
class State:
    """One graph on its way through the passes."""

    gm: GraphModule
    config: Compilation
    flow: Flow = Flow()
    sites: list[MatmulSite] = field(default_factory=list)
    alone: list[MatmulRecord] = field(default_factory=list)
    seeds: dict[torch.device, Node] = field(default_factory=dict)
    kernels: dict[tuple[int, str], str] = field(default_factory=dict)
    declined: dict[tuple[int, str], str] = field(default_factory=dict)
    replaced: dict[Node, Node] = field(default_factory=dict)
    histories: dict[torch.device, Any] = field(default_factory=dict)

    def replace(self, old: Node, new: Node) -> None:
        """Every user of ``old`` reads ``new`` instead, and so does who asks for :meth:`current`."""
        replace_all(old, new)
        self.replaced[old] = new

    def current(self, node: Node) -> Node:
        """What stands for ``node`` now: a product can be the operand of another one, and both are rewritten."""
        while node in self.replaced:
            node = self.replaced[node]
        return node

    def planned(self) -> list[MatmulSite]:
        """Sites with at least one GEMM to quantise."""
        return [s for s in self.sites if s.recipe is not None and s.recipe.quantizes]


def recipe_of(site: MatmulSite) -> Recipe:
    """The recipe of a planned site."""
    assert site.recipe is not None
    return site.recipe
