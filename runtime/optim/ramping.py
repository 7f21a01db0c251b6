"""Q-Ramping (TetraJet, arXiv 2502.20853): weights that oscillate between two codes step rarely, by gathered gradients.

For every element of a watched weight W, with its quantised form Ŵ, a probe of T optimizer steps measures

    R = Σ |ΔŴ| / Σ |ΔW|        period = min(largest, ⌊R / 16⌋·5 + 1)

An element that moves steadily has R near 1; one that crosses the middle between two codes again and again moves little
and changes its code often. An element of period p takes part in every p-th step, with the mean of the p gradients;
in between neither it nor its moments change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from quartet.kernels.reference import dequantize, quantize
from quartet.kernels.spec import QuantSpec
from quartet.runtime.optim.base import LowBitOptimizer
from quartet.runtime.optim.fit import unlike

UNIT, GROWTH = 16, 5  # k₁ and k₂ of the paper
_LONGEST = 32767  # of int16
_STATE = ("period", "waited", "gathered", "before", "before_quantized", "moved", "moved_quantized")


def periods(moved: Tensor, moved_quantized: Tensor, largest: int) -> Tensor:
    """int16 ``min(largest, ⌊R/16⌋·5 + 1)`` of two sums; 1 for what has not moved, with its code or without."""
    ratio = torch.where(moved > 0, moved_quantized / moved, 0.0).nan_to_num(nan=0.0)
    return ((ratio / UNIT).floor().clamp(max=_LONGEST) * GROWTH + 1).clamp(max=largest).to(torch.int16)


@dataclass(eq=False)
class Watched:
    """What is known of one weight; all tensors have its shape.

    ``period`` and ``waited`` int16; ``gathered`` the sum of the gradients since the last step (fp32), None while all
    periods are 1. During a probe, else None: W and Ŵ after the last step and the sums of their movements (fp32).
    """

    period: Tensor
    waited: Tensor
    gathered: Tensor | None = None
    before: Tensor | None = None
    before_quantized: Tensor | None = None
    moved: Tensor | None = None
    moved_quantized: Tensor | None = None


class QRamping:
    """An optimizer whose oscillating weights accumulate their gradients.

    Args:
        optimizer: any elementwise optimizer of ``torch.optim``. Schedulers and hooks go to it, steps come here.
        weights: a model, whose ``nn.Linear`` weights are watched, or the parameters themselves; all 2-D and in a group
            of ``optimizer``.
        spec: the quantiser of W in forward, to nearest, or its text.
        probe: steps that a probe takes, at least 1. interval: steps from one probe's start to the next, at least
            ``probe``; None: one probe, at the start. Periods hold during a probe too; the new ones begin after it.
        largest: the longest period, 1 to 32767; longer than ``probe``, an element may not move in a later probe at all,
            and starts from period 1 again.

    State: 4 bytes an element, 4 more once an element of the weight has a period above 1, and 16 more during a probe.

    Raises:
        ValueError: a value outside of these, no weight to watch, or one that the optimizer does not have.
        TypeError: an optimizer whose states are not elementwise, such as those of ``quartet.optim``.
    """

    def __init__(self, optimizer: Optimizer, weights: nn.Module | Iterable[Tensor], *,
                 spec: QuantSpec | str = "e2m1/32 e8m0 ceil nearest", probe: int = 30, interval: int | None = None,
                 largest: int = 16) -> None:
        if not isinstance(optimizer, Optimizer) or isinstance(optimizer, LowBitOptimizer):
            raise TypeError(f"Q-Ramping holds back single elements, which {type(optimizer).__name__} cannot; give it "
                            "an optimizer of torch.optim such as AdamW")
        self.optimizer = optimizer
        self.spec = QuantSpec.parse(spec) if isinstance(spec, str) else spec
        if self.spec.stochastic or self.spec.takes_amax:
            raise ValueError(f"quantiser '{self.spec}' is not a function of the weight alone; give one to nearest "
                             "whose scales follow from the weight, such as 'e2m1/32 e8m0 ceil nearest'")
        if probe < 1 or (interval is not None and interval < probe) or not 1 <= largest <= _LONGEST:
            raise ValueError(f"probe={probe}, interval={interval}, largest={largest} are not possible; probe is at "
                             f"least 1, interval at least probe, largest from 1 to {_LONGEST}")
        self.probe, self.interval, self.largest = probe, interval, largest
        self.steps = self.left = 0
        self.watched = {weight: _new(weight) for weight in self._weights(weights)}

    def _weights(self, weights: nn.Module | Iterable[Tensor]) -> list[Tensor]:
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if isinstance(weights, nn.Module):
            linear = (m.weight for m in weights.modules() if isinstance(m, nn.Linear))
            chosen = [w for w in dict.fromkeys(linear) if id(w) in held]
        else:
            chosen = list(dict.fromkeys(weights))
        wrong = [tuple(w.shape) for w in chosen if id(w) not in held or w.dim() != 2]
        if wrong or not chosen:
            raise ValueError(f"weights of shapes {wrong} are not 2-D or not in the optimizer; give 2-D parameters that "
                             "it holds" if wrong else "no weight to watch: the model has no nn.Linear whose weight the "
                             "optimizer holds; give the parameters themselves")
        return chosen

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step; ``grad`` of the weights stays as it is. Returns the closure's loss, else None.

        Raises:
            ValueError: a weight that got another shape.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for at, (weight, known) in enumerate(self.watched.items()):
            _refuse_other_shapes(at, weight, {"period": known.period})
        self._begin_probe()
        held_back = [back for weight, known in self.watched.items()
                     if weight.grad is not None and (back := self._hold_back(weight, known)) is not None]
        try:
            self.optimizer.step()
        finally:
            for back in held_back:
                back()
        self.steps += 1
        self._measure()
        return loss

    def _begin_probe(self) -> None:
        if self.steps == 0 or (self.interval is not None and self.steps % self.interval == 0):
            self.left = self.probe
            for weight, known in self.watched.items():
                known.before, known.before_quantized = weight.to(torch.float32, copy=True), self._quantized(weight)
                known.moved, known.moved_quantized = torch.zeros_like(known.before), torch.zeros_like(known.before)

    def _measure(self) -> None:
        if self.left == 0:
            return
        self.left -= 1
        for weight, known in self.watched.items():
            assert known.before is not None
            assert known.before_quantized is not None and known.moved is not None and known.moved_quantized is not None
            now, quantized = weight.to(torch.float32, copy=True), self._quantized(weight)
            known.moved += (now - known.before).abs()
            known.moved_quantized += (quantized - known.before_quantized).abs()
            known.before, known.before_quantized = now, quantized
            if self.left == 0:
                known.period = periods(known.moved, known.moved_quantized, self.largest)
                known.before = known.before_quantized = known.moved = known.moved_quantized = None
                if known.gathered is None and bool((known.period > 1).any()):
                    known.gathered = torch.zeros_like(now)

    def _quantized(self, weight: Tensor) -> Tensor:
        codes, scales, _ = quantize(weight, self.spec)
        return dequantize(codes, scales, self.spec)[:, : weight.shape[1]]

    def _hold_back(self, weight: Tensor, known: Watched) -> Callable[[], None] | None:
        """Give the optimizer the gradients whose turn it is; what is returned undoes its step of the others."""
        if known.gathered is None:
            return None
        own, gathered = weight.grad, known.gathered
        assert own is not None
        known.waited += 1
        gathered += own
        turn = known.waited >= known.period
        weight.grad = torch.where(turn, gathered / known.waited, 0.0).to(own.dtype)
        gathered.masked_fill_(turn, 0.0)
        known.waited.masked_fill_(turn, 0)
        states = [s for s in self.optimizer.state.get(weight, {}).values()
                  if isinstance(s, Tensor) and s.shape == weight.shape]
        kept = [(t, t.detach().clone()) for t in (weight, *states)]

        def undo() -> None:
            weight.grad = own
            for tensor, value in kept:
                tensor.copy_(torch.where(turn, tensor, value))

        return undo

    def state_dict(self) -> dict[str, Any]:
        """``{"optimizer": …, "steps", "left", "weights": [{name: tensor}, …]}``, the weights in order; no copies.

        ``left``: steps that the probe has still to take.
        """
        weights = [{name: value for name in _STATE if (value := getattr(known, name)) is not None}
                   for known in self.watched.values()]
        return {"optimizer": self.optimizer.state_dict(), "steps": self.steps, "left": self.left,
                "weights": weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave. Raises ValueError where the weights are not the same, or it is another
        optimizer's."""
        if lacking := {"optimizer", "steps", "left", "weights"} - set(state):
            raise ValueError(f"the checkpoint lacks {', '.join(map(repr, sorted(lacking)))}: it is not of a QRamping; "
                             "load one of the optimizer inside by ramping.optimizer.load_state_dict")
        shapes = [tuple(weight.shape) for weight in self.watched]
        given = [tuple(entry["period"].shape) for entry in state["weights"]]
        if shapes != given:
            raise ValueError(f"the state is of {len(given)} weights of shapes {given[:4]}…, not of these "
                             f"{len(shapes)} of shapes {shapes[:4]}…; watch the same weights in the same order")
        entries = list(zip(self.watched, state["weights"], strict=True))
        for at, (weight, entry) in enumerate(entries):
            _refuse_other_shapes(at, weight, entry)
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps, self.left = state["steps"], state["left"]
        for weight, entry in entries:
            self.watched[weight] = Watched(**{name: t.to(weight.device, copy=True) for name, t in entry.items()})


def _refuse_other_shapes(at: int, weight: Tensor, states: Mapping[str, Tensor]) -> None:
    for key, x in states.items():
        if problem := unlike(f"the state {key!r}", x, lambda: f"weight {at}", weight):
            raise ValueError(f"{problem}; watch weights of the same shapes in a new QRamping")


def _new(weight: Tensor) -> Watched:
    return Watched(torch.ones_like(weight, dtype=torch.int16), torch.zeros_like(weight, dtype=torch.int16))
