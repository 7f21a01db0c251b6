"""The two ops of inspected graphs: statistics of tensors, and whether the tensors of a product are finite."""

from __future__ import annotations

from urllib.parse import unquote

import torch
from torch import Tensor

from quartet.runtime.inspect.calls import call_of
from quartet.runtime.inspect.program import parsed
from quartet.runtime.inspect.recorder import Flags


@torch.no_grad()
def observe(token: Tensor, tensors: list[Tensor], program: str) -> None:
    """Run a program (``quartet.runtime.inspect.program``) where this step is recorded."""
    call = call_of(token)
    if call is not None and call.takes(program):
        for one in parsed(program):
            one.run(tensors, call)


@torch.no_grad()
def check_finite(token: Tensor, tensors: list[Tensor], layer: str, role: str, names: str) -> None:
    """Note whether each of some tensors of a product is finite.

    Args:
        layer: its name, as ``program.shown`` writes it. names: of the tensors, with ``|`` between them.
    """
    call = call_of(token)
    if call is not None:
        finite = torch.stack([torch.isfinite(_largest(tensor)) for tensor in tensors])
        call.recorder.flag(Flags(call.step, role, call.rename(unquote(layer)), tuple(names.split("|")), finite))


def _largest(x: Tensor) -> Tensor:
    """NaN or infinite where any element is."""
    return torch.linalg.vector_norm(x.detach(), float("inf")) if x.numel() else x.new_zeros(())
