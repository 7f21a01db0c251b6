"""Make a failing program shorter, step by step and size by size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from programs import Program


def shortest(program: Program, fails: Callable[[Program], bool]) -> Program:
    """``program`` without every step, and with every size made plain, that it fails without."""
    while (shorter := next(filter(fails, _shorter(program)), None)) is not None:
        program = shorter
    return program


def _shorter(program: Program) -> Iterator[Program]:
    for i in range(len(program.steps)):
        yield replace(program, steps=program.steps[:i] + program.steps[i + 1:])
    for name, value in (("times", program.times[:1]), ("batch", 1), ("dtype", "float32"), ("width", 64)):
        if getattr(program, name) != value:
            yield replace(program, **{name: value})
