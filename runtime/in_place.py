"""Models that are compiled in place, by ``Module.compile`` or ``quartet.compile``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from quartet.runtime.compat import is_skipped


def warn_of_skipped(frame: FrameType | None) -> None:
    """A warning if ``frame`` is inside of a ``model.compile(…)`` that compiles nothing of ``model`` itself."""
    while frame is not None and frame.f_code is not torch.nn.Module.compile.__code__:
        frame = frame.f_back
    if frame is None or frame.f_back is None or not is_skipped(model := frame.f_locals["self"]):
        return
    name = type(model).__name__
    warnings.warn_explicit(
        f"{name}.compile(…) leaves {name} itself uncompiled, and unquantised: its forward is PyTorch's own code, which "
        "dynamo skips there. quartet.compile(model) and torch.compile(model) compile it", UserWarning,
        frame.f_back.f_code.co_filename, frame.f_back.f_lineno)


@contextmanager
def not_compiled(model: torch.nn.Module) -> Iterator[None]:
    """No module of ``model`` is one that ``Module.compile`` has compiled."""
    found = [(module, made) for module in model.modules()
             if (made := vars(module).get("_compiled_call_impl")) is not None]
    for module, _ in found:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, made in found:
            module._compiled_call_impl = made
