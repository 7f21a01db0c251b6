"""Everything that the passes are told of one compilation, and the key that the compile caches get of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields, replace
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch.fx import GraphModule

from quartet.lowering.recipe.records import MatmulRecord, SavedRecord
from quartet.lowering.recipe.resolution import Choice, Resolution, SavedChoice
from quartet.lowering.recipe.types import Recipe
from quartet.passes.residuals.budget import Budget
from quartet.runtime.devices import Target

LEAST = 32  # elements: a block of the MX formats, and what an 8-bit tensor core contracts at once
UNKEYED: Mapping[str, Any] = {"key": None}  # metadata of a field that no key holds


class Observer:
    """Watches the pipeline: dumps, logs, tests. What a subclass does not define does nothing.

    Attributes:
        cached: the caches may answer although it watches; it then sees nothing.
    """

    cached = False

    def before(self, index: int, name: str, gm: GraphModule) -> None:
        """A pass is about to run."""

    def after(self, index: int, name: str, gm: GraphModule, seconds: float) -> None:
        """A pass has run, in ``seconds``."""

    def finish(self, records: Sequence[MatmulRecord], gm: GraphModule) -> None:
        """All passes have run."""

    def kept(self, size: int) -> None:
        """Forward leaves so many bytes for backward."""

    def saved(self, records: Sequence[SavedRecord], forward: GraphModule, backward: GraphModule) -> None:
        """The graph has been parted into forward and backward."""


@dataclass(frozen=True)
class Inspection:
    """What statistics are recorded of a graph; ``what_if``: other recipes that its tensors are measured under."""

    what_if: tuple[Recipe, ...] = ()


class Decides(Protocol):
    """A policy, as the passes see it; ``quartet.policy.Policy`` describes the methods."""

    @property
    def where_it_pays(self) -> bool: ...

    def resolve(self, op_class: str, fqn: str | None, m: Any, n: Any, k: Any, layer: tuple[int, int] | None = None,
                aside: Mapping[str, str] | None = None) -> Resolution: ...

    def candidates(self) -> tuple[Decides, ...]: ...

    def resolve_saved(self, fqn: str | None) -> SavedChoice: ...

    def key(self) -> str: ...


def keyed_by(how: Callable[[Any], Any]) -> Mapping[str, Any]:
    """Metadata of a field: what of the record is written into its key instead of the field's value."""
    return {"key": how}


def key_of(record: Any) -> str:
    """The fields of a dataclass as text, but those that are ``UNKEYED``: equal for equal values in any order."""
    values = ((f.name, f.metadata.get("key", attrgetter(f.name))) for f in fields(record))
    return repr([(name, _ordered(how(record))) for name, how in values if how is not None])


def _ordered(value: Any) -> Any:
    if isinstance(value, Mapping):
        return sorted((key, _ordered(each)) for key, each in value.items())
    return sorted(value) if isinstance(value, Set) else value


@dataclass(frozen=True)
class Compilation:
    """What one compilation of one dynamo graph is to be: made at the front door of the user's options, the names that
    the model gives, and what is known of this machine.

    Attributes:
        policy: decides for each matmul about its three GEMMs, and about what else is kept for backward.
        options: all options of the user as text, also those that no pass reads.
        weights: index of a dynamo input → parameter name, for the inputs that are parameters.
        regions: the same of the body of each ``nested_compile_region``, whose graph does not say which inputs are
            parameters, by its signature.
        strict: a planned matmul that cannot be lowered is an error.
        disable_passes, disable_kernels: names left out.
        recompute: overrides the recipes' own choice when not None.
        memory: how much may be kept for backward, by which products and formats are chosen; None chooses nothing.
        partition: divides a joint graph in two where that is chosen by: the user's own partitioner, or PyTorch's.
        accumulation: of FP8 tensor cores, ``"fast"`` or ``"promoted"``.
        reuse_weights: quantised weights may serve all forwards of an optimizer step.
        portable_rounding: the bits of the reference, also where a device has conversions or sums of its own.
        eval: what graphs without backward compute; None leaves them in the model's dtype.
        target: choose kernels for this instead of the devices that hold the tensors; nothing of it can run.
        observers: called around every pass; what they watch is in no cache.
        replayed: what runs on a GPU is recorded in CUDA graphs.
        autotune: kernels may measure, when they first run, which of them is fastest.
        anchor: index of the dynamo input by which delayed scaling finds its histories (``quartet.runtime.slots.amax``).
        inspection: what statistics are recorded, None for none. check: ``"finite"`` looks at each product.
        token: index of the dynamo input by which what is recorded finds its call (``quartet.runtime.inspect.calls``).
        modules: what dynamo writes for a module → its name in the model.
        widths: how many features the layers of the model read, also those that are in no graph or in another one.
        complete: nothing of the model is still to come after the graph, or around it.
        alone: name in the model of the layer that was compiled by itself; empty where more was.
        tables: names of layers whose weights are those of embeddings, which may be in another graph.
        parts: names of layers that are no heads, though what they make leaves the graph.
        block: the graph is of a block of a stack or of a part of one, whose layers' names are not those of a model.
        written: how many features they make. layers: how many weights of two dimensions or more the model has.
        inputs: index of a dynamo input → its name, for the floating-point inputs of the whole model.
        priced: rates are known for a device of the graph and the policy asks for them: every number of tokens decides,
            and not only whether it is less than a block. rates: these, as text.
        tokens: module → how many tokens it was first trained with, by which it is decided.
        guessed: module → for how many it was priced in graphs without backward, before it was trained.
        answers: what the kernels say here of the products that the policy can ask for (``registry.answers``).
        threads: of PyTorch on the CPU. version: of PyTorch.
    """

    policy: Decides = field(metadata=keyed_by(lambda c: c.policy.key()))
    options: str = ""
    weights: Mapping[int, str] = field(default_factory=dict)
    regions: Mapping[tuple[str, ...], Mapping[int, str]] = field(default_factory=dict)
    strict: bool = False
    disable_passes: tuple[str, ...] = ()
    disable_kernels: tuple[str, ...] = ()
    recompute: str | None = None
    memory: Budget | None = None
    partition: Callable[..., tuple[GraphModule, GraphModule]] | None = field(
        default=None, metadata=keyed_by(lambda c: c.partition and getattr(c.partition, "uuid", lambda: "PyTorch's")()))
    accumulation: str = "fast"
    reuse_weights: bool = False
    portable_rounding: bool = False
    eval: str | None = "as trained"
    target: Target | None = None
    observers: tuple[Observer, ...] = field(default=(), metadata=UNKEYED)
    replayed: bool = False
    autotune: bool = False
    anchor: int | None = None
    inspection: Inspection | None = None
    check: str | None = None
    token: int | None = None
    modules: Mapping[str, str] = field(default_factory=dict)
    widths: frozenset[int] = frozenset()
    written: frozenset[int] = frozenset()
    complete: bool = True
    alone: str = ""
    tables: frozenset[str] = frozenset()
    parts: frozenset[str] = frozenset()
    block: bool = False
    layers: int = 0
    inputs: Mapping[int, str] = field(default_factory=dict)
    priced: bool = False
    rates: str = ""
    tokens: Mapping[str, int] = field(default_factory=dict, metadata=keyed_by(lambda c: c.decisive(c.tokens)))
    guessed: Mapping[str, int] = field(default_factory=dict, metadata=keyed_by(lambda c: c.priced and c.guessed))
    answers: str = ""
    threads: int = 0
    version: str = torch.__version__

    def key(self) -> str:
        """All that the result depends on beyond the graph and this package's source, as text."""
        return key_of(self)

    def decisive(self, tokens: Mapping[str, int]) -> Any:
        """What of the tokens of modules the plan depends on."""
        return tokens if self.priced else sorted(name for name, count in tokens.items() if count < LEAST)

    @property
    def called(self) -> float:
        """A layer's part of what graphs take the host to be called; 0 where the model's layers are not known."""
        return 1 / self.layers if self.layers else 0.0

    @property
    def where_it_pays(self) -> bool:
        """Leave layers alone that the policy's default would make slower."""
        return self.policy.where_it_pays

    def resolve(self, *site: Any) -> Resolution:
        """(op class, FQN, m, n, k[, layer[, aside]]) → what the policy decides for the three GEMMs; layer as of
        ``quartet.passes.classify.layers``, aside as of ``quartet.passes.sites``."""
        return self.policy.resolve(*site)

    def target_of(self, device: torch.device) -> Target:
        """What the kernels for tensors on ``device`` are chosen for."""
        return self.target or Target.of(device)

    def evaluating(self) -> Compilation:
        """The same for a graph without backward."""
        return self if self.eval is not None else replace(self, policy=_Exact(self.policy))


@dataclass(frozen=True)
class _Exact:
    """The policy of graphs that evaluate, under ``eval=None``: that of training, but for the products."""

    trained: Decides

    @property
    def where_it_pays(self) -> bool:
        return self.trained.where_it_pays

    def resolve(self, *site: Any) -> Resolution:
        choice = Choice(None, None, "evaluation stays in the model's dtype: option eval=None")
        return Resolution(choice, choice, choice)

    def candidates(self) -> tuple[Decides, ...]:
        return (self,)

    def resolve_saved(self, fqn: str | None) -> SavedChoice:
        return self.trained.resolve_saved(fqn)

    def key(self) -> str:
        return self.trained.key()
