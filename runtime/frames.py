"""The calls that Python is inside of: of modules, of steps of optimizers, and where in memory they lie."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import update_wrapper
from types import FrameType
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])
_STEP = torch.optim.Optimizer.profile_hook_step(lambda optimizer: None).__code__  # what torch wraps every step in
_ROOM = 1 << 16  # words: half of the piece of 1 MiB that CPython maps for a frame so large


def calls(frame: FrameType | None) -> tuple[list[torch.nn.Module], list[torch.nn.Module], torch.nn.Module | None]:
    """The modules whose calls ``frame`` is inside of, the outermost first: those outside of what torch.compile made,
    those inside, and the module that it was given; None for a function that is no method and takes none first.

    Only frames of torch are looked into: reading the variables of a user's frame would keep them alive.
    """
    outside: list[torch.nn.Module] = []
    inside: list[torch.nn.Module] = []
    part = None
    while frame is not None:
        if calls_module(frame):
            outside.insert(0, frame.f_locals["self"])
        elif (frame.f_code.co_name, frame.f_globals.get("__name__")) == ("compile_wrapper", "torch._dynamo.eval_frame"):
            inside, outside = outside + inside, []
            arguments = frame.f_locals.get("args") or ()
            owner = _owner(frame.f_locals.get("fn"), arguments[0] if arguments else None)
            part = owner if isinstance(owner, torch.nn.Module) else None
        frame = frame.f_back
    return outside, inside, part


def calls_module(frame: FrameType) -> bool:
    """Whether ``frame`` is torch's own code around a module's forward. Codes are told by identity: those that dynamo
    makes may hold constants without a hash."""
    return any(frame.f_code is call.__code__ for call in (torch.nn.Module._call_impl,
                                                          torch.nn.Module._wrapped_call_impl))


def optimizer_steps(frame: FrameType | None) -> int:
    """How many steps of optimizers ``frame`` is inside of, each inside of the one before. Nothing remains of one that
    has failed."""
    count = 0
    while frame is not None:
        count += frame.f_code is _STEP
        frame = frame.f_back
    return count


def with_room(function: F) -> F:
    """The same function, below which all calls lie in one piece of memory.

    CPython keeps frames in pieces of 16 KiB. A loop that stands at the end of one has a piece mapped, and given back,
    for every call that it makes: that takes longer than most of them do, and a compilation is deep enough to meet
    several such ends. A frame larger than a piece is given one with half a MiB to spare.
    """
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    call.__code__ = call.__code__.replace(co_stacksize=_ROOM)
    return cast(F, update_wrapper(call, function))


def _owner(function: Any, first: Any) -> Any:
    """What a function is a method of, else ``first``; dynamo wraps the modules whose code it would skip, torch's own
    layers, in a function."""
    wrapped = inspect.unwrap(function, stop=lambda inner: isinstance(inner, torch.nn.Module))
    return wrapped if isinstance(wrapped, torch.nn.Module) else getattr(wrapped, "__self__", first)
