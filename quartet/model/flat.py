"""Parameters under FSDP version 1, whose modules hold views of a flat parameter in their place while forward runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from quartet.runtime import compat

WRAPPER = "_fsdp_wrapped_module"  # the name of a module in the one that FSDP puts around it


def own_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Name → each parameter of a module itself, and not of those in it, or the view that stands for it."""
    found: dict[str, Tensor] = dict(nn.Module.named_parameters(module, recurse=False))
    if compat.is_flattened(module):
        found.update((name, value) for name, value in vars(module).items() if is_view(value))
    return found


def path_in_model(path: str) -> str:
    """A module's name without the wrappers around it."""
    return ".".join(part for part in path.split(".") if part != WRAPPER)


def all_parameters(module: nn.Module) -> Iterator[Tensor]:
    """The parameters of a module and those in it, each once."""
    yield from {id(p): p for inner in nn.Module.modules(module) for p in own_parameters(inner).values()}.values()


def is_view(value: Any) -> bool:
    """Whether a value can be such a view."""
    return isinstance(value, Tensor) and value._is_view() and value.is_floating_point()
