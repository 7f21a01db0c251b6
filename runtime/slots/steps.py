"""When histories advance: once an optimizer step, after it, by the largest magnitudes that its micro-batches had.

The pending values of the weights that an optimizer has stepped, and of those that no optimizer steps and that share a
call with one of them (frozen ones), are pushed into their histories. Over the ranks that train a weight together they
are maximised before, all in one collective (``quartet.runtime.slots.ranks``); forwards and backwards have none.

- Optimizers that step inside of another's step count when that has ended, and those that step inside of a backward,
  a parameter each, when it has.
- A compiled step does not say what it steps. The next forward notices it, and pushes what this rank has seen.
- A step that was captured in a CUDA graph is not noticed when it is replayed: what it steps advances in every forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from quartet.runtime.optimizer_steps import OPTIMIZER_STEPS
from quartet.runtime.slots.amax import calls
from quartet.runtime.slots.ranks.replicas import distributed, wrappers
from quartet.runtime.slots.ranks.shared import Shared
from quartet.runtime.slots.remembered import WEIGHTS, Weight
from quartet.runtime.slots.rows import push_alone


@dataclass
class Held:
    """What an optimizer's step advances.

    Attributes:
        key: what it was looked up for. weights: its own and those that follow it.
        wrappers: modules with weights of ours that hold its parameters and divide their training among ranks.
        loose: its parameters that none of them holds.
    """

    key: tuple[Any, ...]
    weights: list[Weight]
    wrappers: list[ref[nn.Module]]
    loose: list[Tensor]


@dataclass
class Snapshot:
    """What there was when ``WEIGHTS.known`` was ``known``, by ``id`` of parameters."""

    known: int
    present: dict[int, ref[Weight]]
    wrapper: dict[int, ref[nn.Module]]


class Steps:
    """What the optimizer steps of this process advance."""

    def __init__(self) -> None:
        self._compiled = OPTIMIZER_STEPS.compiled
        self._stepped: list[Optimizer] = []  # and not yet advanced
        self._held = WeakIdKeyDictionary()
        self._snapshot = Snapshot(0, {}, {})
        self._shared: list[Shared] = []

    def watch(self) -> None:
        """Learn of optimizer steps from now on."""
        OPTIMIZER_STEPS.after_each(self._after_step)

    def after_compiled_steps(self) -> None:
        """Whatever optimizers count is due if a compiled one has stepped: it does not say which weights."""
        if self._compiled != OPTIMIZER_STEPS.compiled:
            self._compiled = OPTIMIZER_STEPS.compiled
            for weight in WEIGHTS.of.values():
                for kept in (*weight.slots.values(), *weight.averages.values()):
                    kept.due = True

    def _after_step(self, optimizer: Optimizer) -> None:
        held = self._held_by(optimizer) if len(WEIGHTS.of) else None
        if held is not None and (held.weights or held.wrappers):
            captured = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
            for weight in held.weights:
                weight.observed = weight.observed and not captured
                weight.stepped()
                weight.count()
            if not captured and optimizer not in self._stepped:
                self._stepped.append(optimizer)
        if self._stepped:
            OPTIMIZER_STEPS.at_the_end(self._advance)

    def _held_by(self, optimizer: Optimizer) -> Held:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        key = WEIGHTS.known, *map(id, parameters)
        found = self._held.get(optimizer)
        if found is None or found.key != key:
            if self._snapshot.known != WEIGHTS.known:
                self._snapshot = _snapshot()
            found = self._held[optimizer] = _held(optimizer, parameters, key, self._snapshot)
        return found

    def _advance(self) -> None:
        """Push what the steps so far ask for, in as many collectives as there are groups of ranks."""
        stepped, self._stepped = self._stepped, []
        held = [self._held_by(optimizer) for optimizer in stepped]
        weights = {id(weight): weight for one, optimizer in zip(held, stepped, strict=True)
                   for weight in one.weights if weight.counted and weight.is_of(optimizer)}
        if distributed():
            wrapped = list({id(m): m for one in held for get in one.wrappers if (m := get()) is not None}.values())
            loose = [parameter for one in held for parameter in one.loose]
            holders = [optimizer for one, optimizer in zip(held, stepped, strict=True) if one.loose]
            for number in self._shared_by(wrapped, holders, len(loose)).advance(wrapped, loose, weights.keys()):
                weights.pop(number, None)
        push_alone(slot for weight in weights.values() for slot in weight.slots.values())

    def _shared_by(self, wrapped: Sequence[nn.Module], optimizers: Sequence[Optimizer], loose: int) -> Shared:
        self._shared = [shared for shared in self._shared if shared.alive]
        found = next((shared for shared in self._shared if shared.is_of(wrapped, optimizers, loose)), None)
        if found is None:
            found = Shared(wrapped, optimizers, loose)
            self._shared.append(found)
        return found


def _snapshot() -> Snapshot:
    present = WEIGHTS.of.present()
    wrapper: dict[int, ref[nn.Module]] = {}
    for module in wrappers():
        inside = {id(parameter) for parameter in module.parameters()}
        if not present.keys().isdisjoint(inside):
            wrapper.update(dict.fromkeys(inside, ref(module)))
    return Snapshot(WEIGHTS.known, {number: ref(weight) for number, weight in present.items()}, wrapper)


def _held(optimizer: Optimizer, parameters: Sequence[Tensor], key: tuple[Any, ...], known: Snapshot) -> Held:
    numbers = [id(parameter) for parameter in parameters]
    inside = dict.fromkeys(known.wrapper[number] for number in numbers if number in known.wrapper)
    own = [weight for n in numbers if n in known.present and (weight := known.present[n]()) is not None]
    for weight in own:
        weight.holder = ref(optimizer)
    found = {id(weight): weight for weight in own}
    for call in calls() if own else ():
        if not found.keys().isdisjoint(map(id, call)) and any(weight in own for weight in call):
            found.update((id(weight), weight) for weight in call if weight.is_of(optimizer))
    loose = [p for p in parameters if id(p) not in known.wrapper] if own else []
    return Held(key, list(found.values()), list(inside), loose)


STEPS = Steps()
