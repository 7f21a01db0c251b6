"""Models that are compiled in place, by ``Module.compile`` or ``quartet.compile``."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from quartet.runtime.compat import compile_in_place, cutting_wrappers, is_skipped


def warn_of_skipped(frame: FrameType | None) -> None:
    """A warning if ``frame`` is inside of a call of PyTorch's that compiles nothing of the model that it was given."""
    while frame is not None:
        text = _skipped(frame)
        if text is not None and frame.f_back is not None:
            warnings.warn_explicit(text, UserWarning, frame.f_back.f_code.co_filename, frame.f_back.f_lineno)
            return
        frame = frame.f_back


def _skipped(frame: FrameType) -> str | None:
    """What is said of a model that stays uncompiled by the call in this frame."""
    if frame.f_back is not None and frame.f_back.f_code is compile_in_place.__code__:
        return None  # it has dynamo compile the code of torch.nn too
    if frame.f_code is torch.nn.Module.compile.__code__ and is_skipped(model := frame.f_locals["self"]):
        name = type(model).__name__
        return (f"{name}.compile(…) leaves {name} itself uncompiled, and unquantised: its forward is PyTorch's own "
                "code, which dynamo skips there. quartet.compile(model) and torch.compile(model) compile it")
    if frame.f_code is torch.compile.__code__ and isinstance(model := frame.f_locals["model"], torch.nn.Module):
        inner, name = inside_wrappers(model), type(model).__name__
        if inner is not model:
            return (f"torch.compile leaves {type(inner).__name__} inside of {name} uncompiled, and unquantised: its "
                    "forward is PyTorch's own code, which dynamo skips there. quartet.compile(model) compiles it, and "
                    "so does torch.compile before it is wrapped")
    return None


def inside_wrappers(model: torch.nn.Module) -> torch.nn.Module:
    """What has to be compiled for a model to be: of ``DistributedDataParallel`` and of FSDP version 1 around a layer of
    ``torch.nn`` itself the layer, since dynamo breaks the graph in the wrapper and skips the layer as a frame."""
    while isinstance(model, cutting_wrappers()) and is_skipped(inner := model.get_submodule("module")):
        model = inner
    return model


def refuse_sharded(model: torch.nn.Module) -> None:
    """Raise TypeError for a layer of ``torch.nn`` itself under ``fully_shard``: compiled in place nothing of it is,
    since its hooks break the graph and dynamo skips what is left."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp and isinstance(model, fsdp.FSDPModule) and is_skipped(model):
        own = next(kind.__name__ for kind in type(model).__mro__ if kind.__module__.startswith("torch.nn"))
        raise TypeError(f"{own} under fully_shard cannot be compiled: its forward is PyTorch's own code, which dynamo "
                        f"skips after the hooks of FSDP2. Give it a class with a forward of its own (class "
                        f"Block({own}): def forward(self, *args): return super().forward(*args)) before it is sharded")


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
