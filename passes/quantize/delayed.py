"""Delayed scaling: quantisers with rule ``delayed`` take the largest magnitude of earlier steps.

A slot's magnitude is that of its history, or of the tensor itself while the history is empty:

    used = 2^margin · (history > 0 ? history : amax(x))

The histories are read at the start of forward, outside of any checkpointed region; what forward and backward have seen
is recorded once, at the end of backward: a forward whose backward does not run, and one that is computed again, leave
nothing. Both are ops of ``quartet.runtime.slots.amax``."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from quartet.lowering import ir
from quartet.lowering.ir.graph import (
    BACKWARD,
    FORWARD,
    Builder,
    argument,
    aten,
    editing,
    is_backward,
    set_argument,
    source,
    source_of,
    val,
)
from quartet.lowering.ir.ops.state import AMAX_BEGIN, AMAX_NOTE, AMAX_READ, AMAX_RECORD, AMAX_SEEN
from quartet.lowering.ir.views import Hadamard
from quartet.passes.find.find_matmuls import input_indices
from quartet.passes.graph_pass import graph_pass
from quartet.passes.sites import MADE_KEY, Found, Planned, Quantized
from quartet.passes.state import State
from quartet.runtime.slots.amax import Entry
from quartet.runtime.view_ops import CAST, ORDERS, RESHAPES

MUST_BE_IN_FORWARD = "must_be_in_forward"
SLOT_KEY = "quartet_slot"  # node.meta key of what an operand's own magnitude is: device and slot of its history
_SHOWN = RESHAPES | ORDERS | {aten.alias.default}
_AS_LARGE = _SHOWN | {CAST, aten.constant_pad_nd.default, aten.clone.default}  # the largest magnitude is the same


@dataclass
class _Slots:
    """Those of a graph on one device.

    Attributes:
        anchor: the input that stands for the weights of a call. begin: the op that reads the histories.
        weights: site → its weight's input.
        used: (site, of a weight its input, operand, tensor) → its magnitude.
    """

    anchor: Node
    begin: Node
    weights: list[int | None]
    entries: list[Entry] = field(default_factory=list)
    used: dict[tuple[int, str, Node], Node] = field(default_factory=dict)


class Histories:
    """What the operands of a graph are scaled by under the rule ``delayed``, while its quantisers are put in."""

    def __init__(self, state: State) -> None:
        self._state, self._slots = state, dict[torch.device, _Slots]()

    def amax_of(self, build: Builder, x: Node, site: Planned, operand: str) -> Node:
        """fp32 ``[1, 1]`` that scales ``x``, the operand ``"x"``, ``"w"`` or ``"e"`` of a site.

        A history belongs to a weight. A product without one, such as of two inputs, and a graph without an anchor, the
        body of a region, take the tensor's own magnitude.
        """
        owner, history = _owner(self._state, site, operand), site.recipe.history
        weight = weight_index(self._state, owner)
        held = None if weight is None else self._on(val(x).device)
        if weight is None or held is None:
            return _with_margin(build, build(ir.AMAX, x), history.margin)
        origin = _origin(x)
        key = weight if operand == "w" else owner.index, operand, origin
        if key not in held.used:
            first = 1 if operand == "w" else 1 + held.weights[: owner.index].count(weight)
            name = _free_name(held, weight, operand, first, _made(origin))
            held.used[key] = _new_slot(held, origin, Entry(weight, name, history.entries), history.margin)
        return held.used[key]

    def _on(self, device: torch.device) -> _Slots | None:
        """The slots on a device, begun when first asked for; None in a graph without an anchor."""
        anchor = _anchor(self._state)
        if device not in self._slots and anchor is not None:
            weights = [weight_index(self._state, site) for site in self._state.sites]
            self._slots[device] = _Slots(anchor, _start(self._state, anchor, device), weights)
        return self._slots.get(device)


def without_history(state: State, site: Planned, operand: str) -> str | None:
    """Why an operand that is scaled under the rule ``delayed`` has no history; None where it has one."""
    if weight_index(state, _owner(state, site, operand)) is None:
        return "no weight of its own to keep a history for"
    return "no history in a nested region" if _anchor(state) is None else None


def _owner(state: State, site: Planned, operand: str) -> Found:
    """The site that an operand is measured for."""
    return state.site(site.x_group) if operand == "x" else site


def _new_slot(held: _Slots, x: Node, entry: Entry, margin: int) -> Node:
    """The magnitude for a new slot, computed where ``x`` is: all that read it come later."""
    slot = len(held.entries)
    held.entries.append(entry)
    set_argument(held.begin, "table", " ".join(map(str, held.entries)))
    build = Builder(x.graph, like=x, before=max(x, held.begin).next, backward=is_backward(x))
    with build.mode:
        held.begin.meta["val"] = val(held.begin).new_empty(len(held.entries))
    current = build(ir.AMAX, x)
    current.meta[SLOT_KEY] = val(held.begin).device, slot
    known = build(aten.view.default, build(aten.slice.Tensor, held.begin, 0, slot, slot + 1), [1, 1])
    amax = build(aten.where.self, build(aten.gt.Scalar, known, 0), known, current)
    return _with_margin(build, amax, margin)


def _origin(x: Node) -> Node:
    """What ``x`` shows in another shape."""
    while x.target in _SHOWN:
        x = source_of(x)
    return x


@graph_pass(reads=Quantized, summary="what the operands' largest magnitudes were is recorded for the next step")
def delayed(state: State) -> None:
    """Record what the tensors of forward and backward had, at the end of backward."""
    graph = state.gm.graph
    slots = {node.meta[SLOT_KEY]: node for node in graph.find_nodes(op="call_function", target=ir.AMAX)
             if SLOT_KEY in node.meta}
    with editing(state.gm):
        for begin in graph.find_nodes(op="call_function", target=AMAX_BEGIN):
            seen = {slot: node for (device, slot), node in sorted(slots.items(), key=lambda item: item[0][1])
                    if device == val(begin).device}
            if seen:
                _record(graph, begin, seen)


def _record(graph: Graph, begin: Node, seen: dict[int, Node]) -> None:
    """``seen``: slot → its magnitude. Those of forward are kept for backward as one vector."""
    forward = {slot: node for slot, node in seen.items() if not is_backward(node)}
    backward = {slot: node for slot, node in seen.items() if slot not in forward}
    kept: list[Node] = []
    if forward:
        build = Builder(graph, like=begin, before=begin.next, backward=False)
        build.meta = {"partitioner_tag": FORWARD, "recompute": CheckpointPolicy.MUST_SAVE}
        kept = [build(AMAX_SEEN, begin, len(forward))]
        build = Builder(graph, like=begin, before=max(forward.values()).next, backward=False)
        build.meta = {"partitioner_tag": MUST_BE_IN_FORWARD}
        build(AMAX_NOTE, *kept, 0, list(forward.values()))
    last = max(*seen.values(), next(node for node in graph.nodes if is_backward(node)))
    build = Builder(graph, like=begin, before=last.next, backward=True)
    build.meta = {"partitioner_tag": BACKWARD}
    build(AMAX_RECORD, argument(begin, "anchor"), argument(begin, "table"), [*forward, *backward],
          [*kept, *backward.values()])


def _anchor(state: State) -> Node | None:
    """The input that stands for the weights of a call."""
    wanted = state.config.anchor
    index = input_indices(state.gm.graph)
    return next((node for node, position in index.items() if wanted is not None and position == wanted), None)


def _start(state: State, anchor: Node, device: torch.device) -> Node:
    graph = state.gm.graph
    first = next(n for n in graph.nodes if n.op != "placeholder")
    build = Builder(graph, like=first, before=first, backward=False)
    build.meta = {"partitioner_tag": MUST_BE_IN_FORWARD}
    trains = any(is_backward(node) for node in graph.nodes)
    return build(AMAX_BEGIN if trains else AMAX_READ, anchor, "", device)


def weight_index(state: State, site: Found) -> int | None:
    """Input of the dynamo graph that is the (first) parameter of a site's weight."""
    index = input_indices(state.gm.graph)
    frontier, seen = [site.w[0]], set()
    while frontier:
        node = frontier.pop()
        if node in seen:
            continue
        seen.add(node)
        position = index.get(node)
        if position is not None and position in state.config.weights:
            return position
        if not is_backward(node):
            frontier += reversed(node.all_input_nodes)
    return None


def _made(x: Node) -> str:
    """What passes have done to an operand before it is measured, in a word; nothing of what leaves magnitudes alone."""
    found: list[str] = []
    turned = False
    while (above := source(x)) is not None:
        if MADE_KEY in x.meta:
            found.insert(0, x.meta[MADE_KEY])
            break
        if x.target is ir.HADAMARD:
            rotation = Hadamard.of(x)
            found.insert(0, f"H{rotation.n}" + ("" if rotation.signs is None else "-signs"))
            turned = False
        elif x.target not in _AS_LARGE:
            break
        turned ^= x.target in (aten.permute.default, aten.t.default)
        x = above
    if turned and found and found[-1].startswith("H"):
        found.append("turned")
    return "".join((":", "+".join(found))) if found else ""


def _free_name(held: _Slots, weight: int, operand: str, first: int, made: str) -> str:
    """``x``, or ``x:H32`` of a rotation of it; of a weight that multiplies several tensors also ``x2``, ``x3``, …

    ``first``: the number to begin with, which does not depend on what the policy leaves alone.
    """
    taken = {entry.operand for entry in held.entries if entry.weight == weight}
    names = (f"{operand}{'' if n == 1 else n}{made}" for n in count(first))
    return next(name for name in names if name not in taken)


def _with_margin(build: Builder, amax: Node, margin: int) -> Node:
    return amax if margin == 0 else build(aten.mul.Tensor, amax, 2.0**margin)
