"""The parameters of a module by name, also under FSDP version 1, whose modules hold views of a flat parameter in their
place while forward runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from quartet.runtime import compat

WRAPPER = "_fsdp_wrapped_module"  # the name of a module in the one that FSDP puts around it
_HOOKED = ("_orig", "_v")  # what the older hooks of torch.nn.utils store in place of a parameter: prune, weight_norm


def own_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Name → each parameter of a module itself, and not of those in it, or the view that stands for it.

    ``weight_orig`` and ``weight_v``, of which a hook computes ``weight``, are called as a parametrised weight is.
    """
    found: dict[str, Tensor] = {_parametrised(module, name): parameter for name, parameter in
                                nn.Module.named_parameters(module, recurse=False)}
    if compat.is_flattened(module):
        found.update((name, value) for name, value in vars(module).items() if is_view(value))
    return found


def _parametrised(module: nn.Module, name: str) -> str:
    for suffix in _HOOKED:
        computed = name.removesuffix(suffix)
        if computed != name and isinstance(vars(module).get(computed), Tensor):
            return f"parametrizations.{computed}.original"
    return name


def path_in_model(path: str) -> str:
    """A module's name without the wrappers around it."""
    return ".".join(part for part in path.split(".") if part != WRAPPER)


def named_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, parameter) of a module and those in it; each once, by its first name."""
    seen = set[int]()
    for path, module in nn.Module.named_modules(model):
        for name, parameter in own_parameters(module).items():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield ".".join(filter(None, (path_in_model(path), name))), parameter


def all_parameters(module: nn.Module) -> Iterator[Tensor]:
    """The parameters of a module and those in it, each once."""
    yield from (parameter for _, parameter in named_parameters(module))


def is_view(value: Any) -> bool:
    """Whether a value can be such a view."""
    return isinstance(value, Tensor) and value._is_view() and value.is_floating_point()
