"""What a joint graph would leave for backward if it were divided: the partitioner is asked with a copy.

PyTorch's own is asked for what it saves, and not to copy the two halves out, which is most of its work: what backward
reads of that, and computes of it, the joint graph says too. Any other divides the copy.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NoReturn, Protocol

import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

from quartet.lowering.ir.graph import BACKWARD, RECOMPUTED, aten, is_backward, outputs
from quartet.passes.compilation import Compilation
from quartet.passes.find.find_matmuls import input_indices
from quartet.passes.residuals.boundary import Kept, Storage, is_symbol, pairs, returned, storages, stored_bytes
from quartet.passes.residuals.lossless import Backward, op_name
from quartet.runtime import compat

Step = Callable[[Callable[..., Any]], Callable[..., Any]]  # of the partitioner, made from its own
_VALUES = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, int, float, type(None))


class Divided(Protocol):
    """What is known of a graph that is, or would be, divided."""

    @property
    def kept(self) -> list[Kept]:
        """What forward leaves for backward, in the order of its results."""

    @property
    def shown(self) -> Sequence[Any]:
        """The user's own results."""

    @property
    def seen(self) -> Backward:
        """Backward's half."""


@dataclass(frozen=True)
class Division:
    """A graph in two, and how many of forward's results are the user's."""

    forward: GraphModule
    backward: GraphModule
    outputs: int

    @property
    def kept(self) -> list[Kept]:
        return pairs(self.forward, self.backward, self.outputs)

    @property
    def shown(self) -> Sequence[Any]:
        return returned(self.forward)[:self.outputs]

    @property
    def seen(self) -> Backward:
        return Backward(self.backward.graph)


@dataclass(frozen=True)
class Cut:
    """A joint graph in one, and what would be saved of it: a node is forward's and backward's at once."""

    graph: Graph
    kept: list[Kept]
    shown: Sequence[Any]
    computed: Collection[Node]  # by backward

    @property
    def seen(self) -> Backward:
        return Backward(self.graph, self.computed)


def own_storages(divided: Divided) -> list[Storage]:
    """What is kept and is no input."""
    return [storage for storage in storages(divided.kept) if storage.root.op != "placeholder"]


def kept_bytes(divided: Divided) -> int:
    """What :func:`own_storages` take."""
    return sum(map(stored_bytes, own_storages(divided)))


def copy_of(gm: GraphModule, again: Collection[Node] = ()) -> GraphModule:
    """A copy of ``gm``, in which backward computes the nodes ``again`` once more."""
    graph, copies = Graph(), dict[Node, Node]()
    output = graph.output(graph.graph_copy(gm.graph, copies))
    output.meta.update(gm.graph.output_node().meta)
    for node in again:
        copies[node].meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
    return compat.make_graph_module(gm, graph)


class Trial:
    """Asks the partitioner about a copy of a joint graph, which is used up."""

    def __init__(self, copied: GraphModule, config: Compilation) -> None:
        self.gm, self.config = copied, config
        primals = [node for node in copied.graph.find_nodes(op="placeholder") if not is_backward(node)]
        index = input_indices(copied.graph)
        self._weights = [i for i, node in enumerate(primals) if index.get(node) in config.weights]
        self._outputs = _of_forward(copied.graph, len(primals))
        self._results: dict[str, Any] = {}  # of what the partitioner does first, whatever runs again
        self._reusable = not any(map(_is_checkpointed, copied.graph.nodes))

    def divided(self) -> Divided:
        """What is kept."""
        solve = compat.with_steps(
            self.config.partition, fx_graph_cse=self._once("merged"),
            classify_nodes=self._once("classified", _extract_graph_with_inputs_outputs=_forward_alone),
            has_recomputable_rng_ops=_unless, _extract_fwd_bwd_modules=_instead_of_copying)
        if solve is not None and not compat.changes_what_it_keeps() and all(map(_is_plain, self.gm.graph.nodes)):
            try:
                return Division(*self._ask(solve), self._outputs)
            except _Saved as found:
                return _cut(self.gm.graph, found.nodes, self._outputs)
            except _Drawn:
                pass
        self._reusable = False
        assert self.config.partition is not None
        return Division(*self._ask(self.config.partition), self._outputs)

    def again(self, gm: GraphModule, nodes: Collection[Node]) -> Trial:
        """The trial of ``gm``, of which this had a copy, where backward computes ``nodes`` of it once more."""
        if not self._reusable:
            return Trial(copy_of(gm, nodes), self.config)
        names = {node.name for node in nodes}
        for node in self.gm.graph.nodes:
            if node.name in names:
                node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
        return self

    def _ask(self, partition: Callable[..., Any]) -> tuple[GraphModule, GraphModule]:
        forward, backward = partition(self.gm, (), compiler="inductor", num_fwd_outputs=self._outputs,
                                      static_lifetime_input_indices=self._weights)
        return forward, backward

    def _once(self, name: str, **steps: Step) -> Step:
        """A step of the partitioner that is taken the first time only, with other steps inside where it has them."""
        def step(theirs: Callable[..., Any]) -> Callable[..., Any]:
            taken = compat.with_steps(theirs, **steps) or theirs

            def result(*args: Any, **kwargs: Any) -> Any:
                if name not in self._results:
                    self._results[name] = taken(*args, **kwargs)
                return self._results[name]
            return result
        return step


class _Saved(Exception):
    """The partitioner has chosen ``nodes``."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = nodes


class _Drawn(Exception):
    """The partitioner would save the states of generators, from which backward draws again."""


def _forward_alone(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Which nodes forward computes, without a graph of them."""
    def found(graph: Graph, inputs: Sequence[Node], results: Sequence[Any], *others: Any) -> Any:
        computed = _computed(graph, inputs, results, _is_backwards)
        known = {*inputs, *computed}
        if not all(node in known for node in results if isinstance(node, Node)):
            return theirs(graph, inputs, results, *others)  # a result of backward stands for an input
        return SimpleNamespace(nodes=[*inputs, *(node for node in graph.nodes if node in computed)])
    return found


def _instead_of_copying(theirs: Callable[..., Any]) -> Callable[..., NoReturn]:
    def stop(gm: GraphModule, saved: Sequence[Node], saved_sym_nodes: Sequence[Node], **others: Any) -> NoReturn:
        raise _Saved([*saved_sym_nodes, *saved])
    return stop


def _unless(draws: Callable[[GraphModule], bool]) -> Callable[[GraphModule], bool]:
    def asked(gm: GraphModule) -> bool:
        if draws(gm):
            raise _Drawn
        return False
    return asked


def _is_checkpointed(node: Node) -> bool:
    """Whether the partitioner may take the choice about a node back, by what else runs again."""
    return node.meta.get("recompute") in RECOMPUTED and bool("ac_graph_id" in node.meta
                                                             or node.meta.get("has_backward_hook"))


def _is_plain(node: Node) -> bool:
    """Whether a node is of the sort that :func:`_computed` knows: no state of a generator, no object that is no tensor,
    no order of streams. The mesh of a DTensor is an input, and a result, with which nothing is computed."""
    if node.op == "placeholder":
        known = isinstance(node.meta.get("val"), _VALUES) or all(user.op == "output" for user in node.users)
        return known and "_seed" not in node.name and "_offset" not in node.name
    value = node.meta.get("val")
    return isinstance(value, (*_VALUES, tuple, list)) and op_name(node) != "control_deps"


def _cut(graph: Graph, saved: Sequence[Node], count: int) -> Cut:
    """What is kept of what is saved: what backward reads, in the order of forward's results."""
    results = [node for node in outputs(graph)[count:] if isinstance(node, Node)]
    gradients = [node for node in graph.find_nodes(op="placeholder") if is_backward(node)]
    computed = _computed(graph, [*saved, *gradients], results, _is_forwards)
    read = [node for node in saved if node in results
            or not all(_is_idle(reader, computed, results) for reader in _readers(node, computed))]
    tensors = [node for node in read if not is_symbol(node) and isinstance(node.meta.get("val"), torch.Tensor)]
    tensors.sort(key=lambda node: bool(node.meta.get("saved_tensor_with_no_vc_check")))
    return Cut(graph, [Kept(node, node) for node in tensors], outputs(graph)[:count],
               _from_gradients(graph, computed, results))


def _computed(graph: Graph, inputs: Iterable[Node], results: Collection[Any],
              is_others: Callable[[Node], bool]) -> set[Node]:
    """What one half computes of its inputs, for its results or to some effect; ``is_others``: what it must not."""
    given, possible = set(inputs), set[Node]()
    for node in graph.nodes:
        if node not in given and not is_others(node) and (node.op == "get_attr" or node.op == "call_function" and all(
                n in given or n in possible for n in node.all_input_nodes)):
            possible.add(node)
    draws, wanted = compat.keeps_dead_draws(), set(results)
    for node in reversed(graph.nodes):
        if node in possible and (node in wanted or node.is_impure(draws)):
            wanted.add(node)
            wanted.update(node.all_input_nodes)
    return wanted & possible


def _from_gradients(graph: Graph, computed: Collection[Node], results: Collection[Node]) -> set[Node]:
    """What of it remains when backward is written in autograd's order: what stands behind the first node that reads a
    gradient, the results, and what these are made of. What came before to some other effect is dropped."""
    gradients = {node for node in graph.find_nodes(op="placeholder") if node.name.startswith("tangents")}
    begun = gradients.isdisjoint([*results, *(n for node in computed for n in node.all_input_nodes)])
    wanted = {node for node in results if node in computed}
    for node in graph.nodes:
        if node in computed:
            begun = begun or not gradients.isdisjoint(node.all_input_nodes)
            if begun or node.target is aten.copy_.default:
                wanted.add(node)
    for node in reversed(graph.nodes):
        if node in wanted:
            wanted.update(n for n in node.all_input_nodes if n in computed)
    return wanted


def _is_forwards(node: Node) -> bool:
    """Whether a node must not run in backward: it is tagged so, or writes to something without being backward's."""
    return node.meta.get("partitioner_tag") == "must_be_in_forward" or (_writes(node) and not is_backward(node))


def _is_backwards(node: Node) -> bool:
    """Whether a node must not run in forward."""
    return node.meta.get("partitioner_tag") == BACKWARD or (_writes(node) and is_backward(node))


def _writes(node: Node) -> bool:
    return isinstance(node.target, compat.OpOverload) and node.target._schema.is_mutable


def _readers(node: Node, computed: Collection[Node]) -> list[Node]:
    return [user for user in node.users if user in computed]


def _is_idle(reader: Node, computed: Collection[Node], results: Collection[Node]) -> bool:
    """Whether a reader waits for a collective whose result nothing reads in backward."""
    return op_name(reader) == "wait_tensor" and reader not in results and not _readers(reader, computed)


def _of_forward(graph: Graph, inputs: int) -> int:
    """How many results are no gradients, not even missing ones. A tensor subclass, of several inputs, may have one."""
    described = graph.output_node().meta.get("desc")
    if described is None:
        return len(outputs(graph)) - inputs
    return sum(desc is not None and not _is_gradient(desc) for desc in described)


def _is_gradient(desc: Any) -> bool:
    while desc is not None and not hasattr(desc, "grad_of"):
        desc = getattr(desc, "base", None)
    return desc is not None
