"""Eight bits an element for what forward leaves to backward and no product reads: a partitioner around the partitioner.

The graph is split first, as it would be without us, so what is kept and what is computed again stays the partitioner's
choice. Then each kept tensor that may lose precision, by the policy or for a budget of bytes, is replaced by its codes
and scales in forward's results, and decoded in backward where it is first read. Forward's own values are not touched.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from quartet.kernels.spec import dtype_name
from quartet.lowering.ir.graph import (
    Builder,
    aten,
    editing,
    remaining,
    shape,
    val,
)
from quartet.lowering.ir.ops.saved import DECODE, ENCODE
from quartet.lowering.recipe.records import MemoryRecord, SavedRecord
from quartet.lowering.recipe.types import Saved
from quartet.lowering.targets.triton.joined import fold_where_quantized
from quartet.passes.compilation import Compilation
from quartet.passes.naming import module_of
from quartet.passes.pipeline import source_digest, without_collections
from quartet.passes.quantize.randomness import draw_seed
from quartet.passes.residuals.boundary import (
    Storage,
    byte_count,
    chain,
    dense_order,
    pairs,
    returned,
    storages,
    stored_bytes,
)
from quartet.passes.residuals.choose import PLAN_KEY, Plan, formats_of, measured
from quartet.passes.residuals.formats import Formats, Way
from quartet.passes.residuals.knapsack import Frontier
from quartet.passes.residuals.lossless import maker_name
from quartet.passes.residuals.trial import Division
from quartet.passes.state import State
from quartet.runtime.compat import CustomPartitionerFn

log = logging.getLogger("quartet")

DRAW = 15  # of the sixteen draws that a site has; the products take the first (see kernels.reference.philox.Draw)
Pair = tuple[GraphModule, GraphModule]
_KIND = ("saved_tensor_with_no_vc_check",)  # by which AOTAutograd sorts forward's results


class SavedActivations(CustomPartitionerFn):
    """Splits a joint graph and encodes what is kept.

    Args:
        config: the pipeline's: the policy, the stream of the random bits, and observers, which see the result.
        own: the user's ``custom_partitioner_fn``, or None. default: what splits the graph without one.
    """

    def __init__(self, config: Compilation, own: Any, default: Callable[..., Pair]) -> None:
        self.config, self.own, self.default = config, own, default
        self.records: list[SavedRecord] = []
        self.memory: list[MemoryRecord] = []

    @without_collections()
    def __call__(self, gm: GraphModule, joint_inputs: Sequence[object], **kwargs: Any) -> Pair:
        plan: Plan | None = gm.graph.output_node().meta.get(PLAN_KEY)
        forward, backward = (self.own or self.default)(gm, joint_inputs, **kwargs)
        rewriting = _Rewriting(Division(forward, backward, kwargs["num_fwd_outputs"]), self.config, plan)
        records = rewriting.run()
        self.records += records
        if rewriting.memory is not None:
            self.memory.append(rewriting.memory)
        for observer in self.config.observers:
            observer.saved(records, forward, backward)
        return forward, backward

    def uuid(self) -> str | None:
        """Cache key; None, which keeps the graph out of the caches, when somebody observes or the user's has none."""
        other = None if self.own is None else self.own.uuid()
        if self.config.observers or (self.own is not None and other is None):
            return None
        return hashlib.sha256(repr((source_digest(), self.config.key(), other)).encode()).hexdigest()


class _Rewriting:
    """One pair of graphs."""

    def __init__(self, division: Division, config: Compilation, plan: Plan | None) -> None:
        self.forward, self.backward, self.outputs = division.forward, division.backward, division.outputs
        self.division, self.plan = division, plan
        self.memory: MemoryRecord | None = None
        self.state = State(self.forward, config)
        self.kept = pairs(self.forward, self.backward, self.outputs)
        self.instead: dict[Node, list[Node]] = {}  # a result of forward → what is returned in its place

    def run(self) -> list[SavedRecord]:
        """Rewrite both graphs; a record for everything kept that is no input, and for what runs again instead."""
        plan = self.plan
        with editing(self.forward), editing(self.backward):
            own = [storage for storage in storages(self.kept) if storage.root.op != "placeholder"]
            chooses = plan is not None and not plan.budget.lossless
            formats = formats_of(self.state.config, self.division, chooses)
            ways = [formats.ways(storage, module_of(storage.root)) for storage in own]
            frontier = Frontier([[way.cost for way in each] for each in ways])
            limit = None if plan is None else plan.budget.limit(plan.plain)
            point = frontier.within(limit) or frontier.least()
            records = [self._apply(site, storage, each[pick], formats)
                       for site, (storage, each, pick) in enumerate(zip(own, ways, point.picks, strict=True))]
            self._return()
            for half in (self.forward, self.backward):
                fold_where_quantized(half.graph)
        if plan is not None:
            self.memory = measured(plan, frontier, point, records, self.state.config)
            records = [*plan.again, *records]
        return records

    def _apply(self, site: int, storage: Storage, way: Way, formats: Formats) -> SavedRecord:
        """Keep a storage in one way; a record of it."""
        before = stored_bytes(storage)
        record = SavedRecord(storage.parts[0].made.name, module_of(storage.root), maker_name(storage.root),
                             tuple(size if isinstance(size, int) else str(size) for size in shape(storage.source)),
                             dtype_name(val(storage.source).dtype), before, None, before, way.reason,
                             formats.prices(storage).seconds(way.cost.time))
        if way.saved is None:
            return record
        if (codes := way.served) is not None:
            self._decode_from(storage, codes.values)
            return replace(record, saved=codes.spec, saved_bytes=0)
        return replace(record, saved=str(way.saved), saved_bytes=self._encode(storage, way.saved, site))

    def _encode(self, storage: Storage, saved: Saved, site: int) -> int:
        """Codes and scales among forward's results, their values in backward; bytes that are kept now."""
        source = storage.source
        order = dense_order(source)
        assert order is not None
        seed = draw_seed(self.state, val(source).device) if saved.rounding == "stochastic" else None
        build = Builder(self.forward.graph, source, self._after(source, seed), backward=False)
        rows = build(aten.permute.default, source, order) if order != sorted(order) else source
        encoded = build(ENCODE, rows, saved.element, saved.group, seed, site * 16 + DRAW if seed is not None else 0)
        codes, scales = build.item(encoded, 0), build.item(encoded, 1)
        made = [self._input(storage, codes, "codes"), self._input(storage, scales, "scales")]

        def decoded(at: Builder) -> Node:
            values = at(DECODE, *made, saved.element, saved.group, val(source).dtype)
            return at.permuted_back(values, order) if order != sorted(order) else values

        self._decode_from(storage, decoded, [codes, scales])
        return byte_count(codes) + byte_count(scales)

    def _after(self, source: Node, seed: Node | None) -> Node:
        """The node before which both ``source`` and ``seed`` are known."""
        for node in reversed(self.forward.graph.nodes):
            if node is source or node is seed:
                return node.next
        raise AssertionError(f"{source} is in another graph")

    def _input(self, storage: Storage, made: Node, what: str) -> Node:
        """An input of backward for a new result of forward."""
        read = storage.parts[0].read
        with self.backward.graph.inserting_before(read):
            node = self.backward.graph.placeholder(f"{read.name}_{what}")
        node.meta["val"] = val(made)
        return node

    def _decode_from(self, storage: Storage, decode: Callable[[Builder], Node], made: Sequence[Node] = ()) -> None:
        """Let backward read what ``decode`` builds, where the first part is read; ``made`` is returned instead."""
        readers = {user for part in storage.parts for user in part.read.users}
        first = next(n for n in self.backward.graph.nodes if n in readers or n.op == "output")
        build = Builder(self.backward.graph, first, first, backward=True)
        source, values = storage.source if made else storage.root, decode(build)
        for number, part in enumerate(storage.parts):
            value = values
            for link in chain(part.made, source):
                assert callable(link.target)
                value = build(link.target, *self._arguments(build, link, value), **link.kwargs)
            part.read.replace_all_uses_with(value)
            self.backward.graph.erase_node(part.read)
            self.instead[part.made] = list(made) if number == 0 else []
        for node in made:
            node.meta |= {key: storage.parts[0].made.meta[key] for key in _KIND if key in storage.parts[0].made.meta}

    def _arguments(self, build: Builder, link: Node, value: Node) -> tuple[Any, ...]:
        """The arguments of a view or cast of forward, in backward: sizes are found or computed there."""
        rest = map_arg(remaining(link), lambda n: build.size(n.meta["val"]))
        return (value, *rest)

    def _return(self) -> None:
        """Write forward's results anew, with their descriptions."""
        output = self.forward.graph.output_node()
        old = returned(self.forward)
        descs = list(output.meta.get("desc") or [None] * len(old))
        traces = list(output.meta.get("output_stack_traces") or [None] * len(old))
        results: list[tuple[Any, Any, Any]] = []
        for i, (node, desc, trace) in enumerate(zip(old, descs, traces, strict=True)):
            replaced = isinstance(node, Node) and i >= self.outputs and node in self.instead
            results += [(new, desc, trace) for new in (self.instead[node] if replaced else [node])]
        values, descs, traces = (list(column) for column in zip(*results, strict=True))
        output.args = (tuple(values) if isinstance(old, tuple) else values,)
        if "desc" in output.meta:
            kept = range(self.outputs, len(descs))
            numbered = {i: replace(descs[i], idx=i - self.outputs) for i in kept if hasattr(descs[i], "idx")}
            output.meta["desc"] = [numbered.get(i, desc) for i, desc in enumerate(descs)]
        if "output_stack_traces" in output.meta:
            output.meta["output_stack_traces"] = traces
