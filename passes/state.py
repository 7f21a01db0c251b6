"""What flows through the pipeline: the graph, the resolved configuration, the sites found so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.fx import GraphModule, Node

from quartet.lowering.ir.graph import replace_all
from quartet.lowering.recipe.records import MatmulRecord, SavedRecord
from quartet.lowering.recipe.resolution import Resolution
from quartet.lowering.recipe.types import Recipe
from quartet.passes.flow import Flow
from quartet.passes.sites import MatmulSite
from quartet.runtime.devices import Target

STREAM_STRIDE = 0x1E3779B97F4A7C15  # odd, so that streams differ in every bit position


class Observer(Protocol):
    """Watches the pipeline: dumps, logs, tests."""

    def before(self, index: int, name: str, gm: GraphModule) -> None: ...

    def after(self, index: int, name: str, gm: GraphModule, seconds: float) -> None: ...

    def finish(self, records: Sequence[MatmulRecord], gm: GraphModule) -> None: ...

    def saved(self, records: Sequence[SavedRecord], forward: GraphModule, backward: GraphModule) -> None: ...


ACCUMULATION = ("fast", "promoted")


@dataclass(frozen=True)
class Config:
    """The pipeline's configuration as plain data.

    Attributes:
        resolve: (op class, FQN, m, n, k[, layer[, aside]]) → what the policy decides for the three GEMMs; layer as of
            ``quartet.passes.classify.layers``, aside as of ``quartet.passes.sites``.
        weights: index of a dynamo input → parameter name, for the inputs that are parameters.
        strict: a planned matmul that cannot be lowered is an error.
        disable_passes, disable_kernels: names left out.
        recompute: overrides the recipes' own choice when not None.
        stream: added to the seed, so that data-parallel ranks draw different bits.
        observers: called around every pass.
        accumulation: of FP8 tensor cores, one of ``ACCUMULATION``.
        reuse_weights: quantised weights may serve all forwards of an optimizer step.
        where_it_pays: leave layers alone that the policy's default would make slower.
        portable_rounding: no rounding by conversions that only some devices have.
        replayed: what runs on a GPU is recorded in CUDA graphs.
        autotune: kernels may measure, when they first run, which of them is fastest.
        anchor: index of the dynamo input by which delayed scaling finds its histories (``quartet.runtime.slots.amax``).
        modules: what dynamo writes for a module → its name in the model.
        widths: how many features the layers of the model read, also those that are in no graph or in another one.
        written: how many features they make. layers: how many weights of two dimensions or more the model has.
        inputs: index of a dynamo input → its name, for the floating-point inputs of the whole model.
        tokens: module → how many tokens it was first trained with, by which it is decided.
        guessed: module → for how many it was priced in graphs without backward, before it was trained.
        evaluates: graphs without backward are quantised as training is; else they stay in the model's dtype.
        target: choose kernels for this instead of the devices that hold the tensors; nothing of it can run.
    """

    resolve: Callable[..., Resolution]
    weights: Mapping[int, str] = field(default_factory=dict)
    strict: bool = False
    disable_passes: tuple[str, ...] = ()
    disable_kernels: tuple[str, ...] = ()
    recompute: str | None = None
    stream: int = 0
    observers: tuple[Observer, ...] = ()
    accumulation: str = ACCUMULATION[0]
    reuse_weights: bool = False
    where_it_pays: bool = False
    target: Target | None = None
    portable_rounding: bool = False
    anchor: int | None = None
    autotune: bool = False
    modules: Mapping[str, str] = field(default_factory=dict)
    widths: frozenset[int] = frozenset()
    replayed: bool = False
    written: frozenset[int] = frozenset()
    layers: int = 0
    inputs: Mapping[int, str] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)
    guessed: Mapping[str, int] = field(default_factory=dict)
    evaluates: bool = True

    def target_of(self, device: torch.device) -> Target:
        """What the kernels for tensors on ``device`` are chosen for."""
        return self.target or Target.of(device)


@dataclass
class State:
    """One graph on its way through the passes."""

    gm: GraphModule
    config: Config
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
