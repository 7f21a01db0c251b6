"""Quantised weights that the forwards of one optimizer step share, while gradients accumulate.

What was made of a weight is kept from the second forward of a step on, and only for a parameter that an optimizer of
``torch.optim``'s kind has stepped: its next step drops everything. A changed version counter (an in-place update, a
checkpoint loaded) or another address (``parameter.data = …``, a module moved) makes a kept result void at once. FSDP
gathers its parameters into tensors that no optimizer holds, so theirs are made anew in every forward. Results belong to
the CUDA stream that made them: micro-batches on two streams quantise a weight once on each, and neither has to wait for
the other. The one change that goes unseen is a write through ``parameter.data`` between two forwards of the same step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar
from weakref import ref

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

Key = tuple[int, int, Hashable]
Results = TypeVar("Results", bound=tuple[Tensor, ...])


class ReusedWeights:
    """Results by the address of a parameter, the stream they were made on and what they were made for."""

    def __init__(self) -> None:
        self._stepped: dict[int, ref[Tensor]] = {}
        self._made: dict[Key, int] = {}  # what this step has made: the parameter's version
        self._repeated: set[Key] = set()  # what an earlier step, or this one, has made twice
        self._kept: dict[Key, tuple[int, tuple[Tensor, ...]]] = {}
        self._used: set[Key] = set()
        self._watching = False

    def serve(self, parameter: Tensor, what: Hashable, make: Callable[[], Results],
              finish: Callable[[Tensor, Tensor, Tensor], Results]) -> Results:
        """``make()``, or ``finish`` of the codes, scales and mask (its first three results) that are kept of it."""
        kept = self.find(parameter, what)
        if kept is not None:
            return finish(*kept)
        made = make()
        self.keep(parameter, what, made[:3])
        return made

    def find(self, parameter: Tensor, what: Hashable) -> tuple[Tensor, ...] | None:
        """Copies of what was kept, or None. They are copies because compiled code may overwrite its results."""
        key = self._key(parameter, what)
        version, kept = self._kept.get(key, (-1, ())) if key is not None else (-1, ())
        if key is None or not kept or version != parameter._version:
            return None
        self._used.add(key)
        return tuple(t.clone() for t in kept)

    def keep(self, parameter: Tensor, what: Hashable, results: tuple[Tensor, ...]) -> None:
        """Remember copies of ``results`` if another forward of this step is likely to ask for them."""
        if not self._watching:
            self._watching = True
            register_optimizer_step_post_hook(self._after_step)
        key = self._key(parameter, what)
        if key is None:
            return
        if self._made.get(key) == parameter._version:
            self._repeated.add(key)
            self._used.add(key)
        self._made[key] = parameter._version
        if key in self._repeated:
            self._kept[key] = parameter._version, tuple(t.clone() for t in results)

    def _key(self, parameter: Tensor, what: Hashable) -> Key | None:
        """None where nothing may be kept: no optimizer's parameter, or a CUDA graph that would replay the choice."""
        if parameter.is_inference() or parameter.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        address = parameter.data_ptr()
        owner = self._stepped.get(address, lambda: None)()
        if owner is None or owner.data_ptr() != address or (owner.device, owner.dtype, owner.shape, owner._version) != (
                parameter.device, parameter.dtype, parameter.shape, parameter._version):
            return None
        return address, _stream(parameter), what

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._repeated -= self._kept.keys() - self._used
        for of_this_step in (self._made, self._kept, self._used):
            of_this_step.clear()
        self._stepped.update((p.data_ptr(), ref(p)) for p in _parameters(optimizer) if type(p) is torch.nn.Parameter)
        self._stepped = {address: p for address, p in self._stepped.items() if p() is not None}


def _stream(parameter: Tensor) -> int:
    """The CUDA stream that reads the parameter now; 0 on other devices."""
    return torch.cuda.current_stream(parameter.device).cuda_stream if parameter.is_cuda else 0


def _parameters(optimizer: torch.optim.Optimizer) -> Iterable[Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"])


def described(x: Tensor, rotation: int, spec: str) -> Hashable:
    """What a quantiser makes of a parameter, beside the parameter: its view or cast, and the quantiser."""
    return tuple(x.shape), x.stride(), x.dtype, rotation, spec


REUSED = ReusedWeights()
