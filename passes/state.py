"""What flows through the pipeline: the graph, what is known of the compilation, the sites in their latest phase."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

from torch.fx import GraphModule, Node

from quartet.lowering.ir.graph import replace_all
from quartet.lowering.recipe.records import MatmulRecord
from quartet.passes.compilation import Compilation
from quartet.passes.flow import Flow
from quartet.passes.sites import Found

Phase = TypeVar("Phase", bound=Found)


@dataclass
class State:
    """One graph on its way through the passes.

    Attributes:
        unchanged: a copy of it as it was before the first pass, where that may be asked what it keeps for backward.
    """

    gm: GraphModule
    config: Compilation
    flow: Flow = Flow()
    unchanged: GraphModule | None = None
    _alone: list[MatmulRecord] = field(default_factory=list)
    _sites: dict[int, Found] = field(default_factory=dict)
    _replaced: dict[Node, Node] = field(default_factory=dict)

    @property
    def sites(self) -> tuple[Found, ...]:
        """All sites, each in its latest phase, by index."""
        return tuple(self._sites.values())

    def at(self, phase: type[Phase]) -> list[Phase]:
        """The sites that have come to a phase, or further."""
        return [site for site in self._sites.values() if isinstance(site, phase)]

    def site(self, index: int) -> Found:
        """A site in its latest phase."""
        return self._sites[index]

    def advance(self, *sites: Found) -> None:
        """Put sites in place of what was known of them. A new one has the next index."""
        for site in sites:
            self._sites[site.index] = site

    @property
    def alone(self) -> tuple[MatmulRecord, ...]:
        """The products that are no site of ours."""
        return tuple(self._alone)

    def leave(self, *records: MatmulRecord) -> None:
        """Note products that are no site, and why."""
        self._alone += records

    def replace(self, old: Node, new: Node) -> None:
        """Every user of ``old`` reads ``new`` instead, and so does who asks for :meth:`current`."""
        replace_all(old, new)
        self._replaced[old] = new

    def current(self, node: Node) -> Node:
        """What stands for ``node`` now: a product can be the operand of another one, and both are rewritten."""
        while node in self._replaced:
            node = self._replaced[node]
        return node
