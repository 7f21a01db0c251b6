"""Quantised weights that the forwards of one optimizer step share, while gradients accumulate.

What was made of a weight is kept from the second forward of a step on, and only for a parameter that an optimizer of
``torch.optim``'s kind has stepped: the next step of any such optimizer drops everything, a fused one too, which moves
no version counter. A changed version counter (an in-place update, a checkpoint loaded) or another storage
(``parameter.data = …``, a module moved) makes a kept result void at once. A compiled step moves the version counter,
and drops everything too. A step that was captured in a CUDA graph does neither when it is replayed, so nothing is kept
of a parameter whose optimizer was ever captured. FSDP gathers its parameters into tensors that no optimizer holds, so
theirs are made anew in every forward. Results belong to the CUDA stream that made them: micro-batches on two streams
quantise a weight once on each, and neither has to wait for the other. The one change that goes unseen is a write
through ``parameter.data`` between two forwards of the same step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from quartet.runtime.optimizer_steps import OPTIMIZER_STEPS
from quartet.runtime.replay.library import LAUNCHER
from quartet.runtime.slots.storages import ByStorage, has_storage, storage_number

Key = tuple[Hashable, ...]
Results = TypeVar("Results", bound=tuple[Tensor, ...])


@dataclass
class _Known:
    """What outlives a step of the parameters in one storage.

    Attributes:
        observed: offset of a parameter → whether all steps of its optimizer are seen; None before the first.
        repeats: what to make → whether to keep it when a step first makes it: it was used again when it last was kept.
    """

    observed: dict[int, bool | None] = field(default_factory=dict)
    repeats: dict[Key, bool] = field(default_factory=dict)


@dataclass
class _Made:
    """What this step has made of a parameter at a version, of several at the sum of theirs; its results once kept."""

    version: int
    kept: tuple[Tensor, ...] | None = None


class ReusedWeights:
    """Codes, scales and masks by the place of a parameter in memory, the stream and what they were made for."""

    def __init__(self) -> None:
        self._known: ByStorage[_Known] = ByStorage(self._drop)
        self._asked = 0  # how many parameters there ever were
        self._strangers = WeakIdKeyDictionary()  # optimizer that held none of them → their number and its own then
        self._captured = WeakIdKeyDictionary()

    def watch(self) -> None:
        """Learn of optimizer steps from now on."""
        OPTIMIZER_STEPS.after_each(self._after_step)

    @property
    def _step(self) -> dict[int, dict[Key, _Made]]:
        """What this step has made, by storage."""
        made: dict[int, dict[Key, _Made]] = OPTIMIZER_STEPS.within.setdefault(self, {})
        return made

    def serve(self, parameter: Tensor, what: Hashable, packed: bool, make: Callable[[bool], Results],
              finish: Callable[[Tensor, Tensor, Tensor], Results]) -> Results:
        """What a quantiser makes of a parameter, now or earlier in this step.

        Args:
            what: see :func:`described`.
            packed: whether codes, scales and mask, the first three results, are wanted; they are empty otherwise.
            make: all results, given whether the first three are to be made. finish: all results from the first three.
        """
        kept = self.find(parameter, what)
        keep = kept is None and self._expects_more(parameter, what)
        if kept is not None or keep or _unkeepable(parameter):
            LAUNCHER.forbid()
        else:
            LAUNCHER.permit(every=not self._may_keep(parameter))
        if kept is not None:
            codes, scales, mask = (t.clone() for t in kept) if packed else kept  # compiled code may overwrite results
            results = finish(codes, scales, mask)
        else:
            results = make(packed or keep)
            if keep:
                self._keep(parameter, what, tuple(t.clone() for t in results[:3]) if packed else results[:3])
        if packed:
            return results
        nothing = results[0].new_empty(0, dtype=torch.uint8)
        return (nothing, nothing.clone(), nothing.clone(), *results[3:])  # type: ignore[return-value]

    def share(self, parameter: Tensor, what: Hashable, make: Callable[[], Tensor],
              others: Sequence[Tensor] = ()) -> Tensor:
        """One result of a parameter, made now or earlier in this step, for a caller that writes nothing to it.

        ``others``: parameters that it is of too, in this order.
        """
        if others:
            if not all([self._may_keep(one) for one in (parameter, *others)]):  # each is to be known from now on
                return make()
            what = what, *((storage_number(other), _offset(other)) for other in others)
        changes = sum(other._version for other in others)
        kept = self.find(parameter, what, changes)
        if kept is not None:
            return kept[0]
        made = make()
        if self._expects_more(parameter, what, changes):
            self._keep(parameter, what, (made,))
        return made

    def find(self, parameter: Tensor, what: Hashable, changes: int = 0) -> tuple[Tensor, ...] | None:
        """What is kept, such as codes, scales and mask, or None. ``changes``: of the other parameters that it is of."""
        number, key = storage_number(parameter), _key(parameter, what)
        made = self._step.get(number, {}).get(key)
        if made is None or made.kept is None or not self._may_keep(parameter):
            return None
        if made.version != parameter._version + changes:
            made.kept = None
            return None
        known = self._known.get(parameter)
        assert known is not None
        known.repeats[key] = True
        return made.kept

    def _expects_more(self, parameter: Tensor, what: Hashable, changes: int = 0) -> bool:
        """Whether another forward of this step is likely to ask for the same; it is made now."""
        if not self._may_keep(parameter):
            return False
        known = self._known.get(parameter)
        assert known is not None
        key, step = _key(parameter, what), self._step.setdefault(storage_number(parameter), {})
        version = parameter._version + changes
        again = LAUNCHER.repeated() or key in step and step[key].version == version
        step[key] = _Made(version)
        keep = again or known.repeats.get(key, False)
        known.repeats[key] = again
        return keep

    def _keep(self, parameter: Tensor, what: Hashable, results: tuple[Tensor, ...]) -> None:
        self._step[storage_number(parameter)][_key(parameter, what)].kept = results

    def _may_keep(self, parameter: Tensor) -> bool:
        """Not without an optimizer whose steps are all seen, nor in a CUDA graph, which would replay the choice."""
        if _unkeepable(parameter):
            return False
        known = self._known.get(parameter)
        if known is None:
            known = _Known()
            self._known.put(parameter, known)
        offset = _offset(parameter)
        if offset not in known.observed:
            known.observed[offset] = None
            self._asked += 1
        return bool(known.observed[offset])

    def _drop(self, storage: int) -> None:
        self._step.pop(storage, None)

    def _after_step(self, optimizer: torch.optim.Optimizer) -> None:
        LAUNCHER.stepped()
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            self._captured[optimizer] = True
        held = self._asked, sum(len(group["params"]) for group in optimizer.param_groups)
        if not self._asked or self._strangers.get(optimizer) == held:
            return
        if self._mark(optimizer, observed=optimizer not in self._captured):
            self._strangers.pop(optimizer, None)
        else:
            self._strangers[optimizer] = held

    def _mark(self, optimizer: torch.optim.Optimizer, observed: bool) -> bool:
        """Note that an optimizer has stepped its parameters; whether any of them was ever asked for."""
        any_known = new = False
        for group in optimizer.param_groups:
            for p in group["params"]:
                known = self._known.get(p) if type(p) is torch.nn.Parameter and has_storage(p) else None
                if known is not None and _offset(p) in known.observed:
                    any_known = True
                    before = known.observed[_offset(p)]
                    known.observed[_offset(p)] = observed and before is not False
                    new = new or bool(known.observed[_offset(p)]) and not before
        if new:
            LAUNCHER.forbid_all()
        return any_known


def _unkeepable(parameter: Tensor) -> bool:
    """Whether nothing may be kept of a parameter just now, whatever its optimizer is."""
    return parameter.is_inference() or parameter.is_cuda and torch.cuda.is_current_stream_capturing()


def _key(parameter: Tensor, what: Hashable) -> Key:
    """Storages may hold several parameters, and parameters of several shapes."""
    return (_offset(parameter), parameter.dtype, tuple(parameter.shape), parameter.stride(),
            _stream(parameter), what)


def _offset(parameter: Tensor) -> int:
    """Where a parameter begins in its storage."""
    return int(parameter.storage_offset())


def _stream(parameter: Tensor) -> int:
    """The CUDA stream that reads the parameter now; 0 on other devices."""
    return torch.cuda.current_stream(parameter.device).cuda_stream if parameter.is_cuda else 0


def described(x: Tensor, rotation: int, signs: Sequence[int] | None, spec: str, *how: Hashable) -> Hashable:
    """What a quantiser makes of a parameter, beside the parameter: its view or cast, its basis, the quantiser, and
    ``how`` where the results of one kernel differ from those of another in their layout or in rounding."""
    return tuple(x.shape), x.stride(), x.dtype, rotation, None if signs is None else tuple(signs), spec, *how


REUSED = ReusedWeights()
