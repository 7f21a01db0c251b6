"""What is remembered of each weight from step to step, and who says when it advances.

A weight is *counted* if an optimizer of ``torch.optim``'s kind steps it, or another weight of the same call: what is
remembered of it then advances once an optimizer step, however many micro-batches that has
(``quartet.runtime.slots.steps``). Anything else advances in every forward of a training graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

from torch import Tensor
from torch.optim import Optimizer

from quartet.runtime.slots.owners import ByParameter, living
from quartet.runtime.slots.ranks.replicas import gathering


@dataclass(eq=False)
class Counted:
    """``due``: the next forward advances it. ``counted``: an optimizer tells when."""

    due: bool = field(default=True, kw_only=True)
    counted: bool = field(default=False, kw_only=True)


@dataclass(eq=False)
class Weight:
    """What is remembered of a weight, by name.

    Attributes:
        counted: an optimizer tells when its slots advance. observed: all steps of that optimizer are seen.
        holder: the optimizer that steps the weight itself, where one is known to.
    """

    slots: dict[str, Any] = field(default_factory=dict)
    averages: dict[str, Any] = field(default_factory=dict)
    counted: bool = False
    observed: bool = True
    holder: ref[Optimizer] | None = None

    def count(self) -> None:
        """From now on an optimizer tells when the slots advance; nothing does while its steps are not all seen."""
        self.counted = self.observed
        for slot in self.slots.values():
            slot.due, slot.counted = not self.counted, self.counted

    def stepped(self) -> None:
        """An optimizer has stepped the weight, so that its averages are due."""
        for average in self.averages.values():
            average.due, average.counted = True, self.observed

    def is_of(self, optimizer: Optimizer) -> bool:
        """Whether no other optimizer is known to step it."""
        holder = None if self.holder is None else self.holder()
        return holder is None or holder is optimizer


class Weights:
    """All that is remembered in this process; it lives as long as its parameter."""

    def __init__(self) -> None:
        self.of: ByParameter[Weight] = ByParameter()
        self.known = 0  # counts weights that came to be known, and calls that they are found to share

    def of_all(self, parameters: Iterable[Tensor]) -> list[Weight]:
        """What is remembered of the parameters of a call, from now on."""
        found = [(parameter, self.of.get(parameter)) for parameter in parameters]
        unknown = any(weight is None for _, weight in found)
        gathered = gathering() if unknown else set()
        looked_up = {id(parameter): (parameter, weight or self.of.take_over(parameter, gathered) or Weight())
                     for parameter, weight in found if weight is None or self.of.module_of(parameter) is None}
        if looked_up:
            self.of.put(list(looked_up.values()))
            self._find_holders(looked_up)
        weights = [looked_up[id(parameter)][1] if weight is None else weight for parameter, weight in found]
        self.known += 1
        if any(weight.counted for weight in weights):
            for weight in weights:
                if not weight.counted and weight.observed:
                    weight.count()
        return weights

    def _find_holders(self, new: dict[int, tuple[Tensor, Weight]]) -> None:
        """Which of them an optimizer steps. Of what FSDP2 gathers it steps the shards, another parameter."""
        shards = False
        for optimizer in living(Optimizer):
            for parameter in (p for group in getattr(optimizer, "param_groups", ()) for p in group["params"]):
                shards = shards or hasattr(parameter, "device_mesh")
                if id(parameter) in new:
                    weight = new[id(parameter)][1]
                    weight.counted, weight.holder = True, ref(optimizer)
        gathered = gathering() if shards else set()
        for parameter, weight in new.values():
            weight.counted = weight.counted or id(self.of.module_of(parameter)) in gathered


WEIGHTS = Weights()
