"""Steps of several micro-batches, of which a weight is quantised once: the whole, and a later micro-batch by itself.

The optimizer, which changes nothing, steps before each measurement and is not timed. Gradients are dropped after every
micro-batch, as if they were added up elsewhere: what is timed are products and the passes around them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import gpu_common as common
import torch
import torch.nn as nn

LATER = " later"  # behind a column's name: of a micro-batch whose weights are quantised already


class Step(common.Case, Protocol):
    """One forward and backward of a model."""

    model: nn.Module


class Whole:
    """``count`` micro-batches of one optimizer step; a ``gpu_common.Case``."""

    def __init__(self, step: Step, count: int) -> None:
        self.step, self.count = step, count
        self.optimizer = torch.optim.SGD(step.model.parameters(), lr=0.0)

    def reset(self, i: int) -> None:
        self.step.reset(i)
        self.optimizer.step()

    def run(self, i: int) -> None:
        for j in range(i, i + self.count):
            self.step.reset(j)
            self.step.run(j)


class Later:
    """The third micro-batch of an optimizer step, or one behind it; a ``gpu_common.Case``."""

    def __init__(self, whole: Whole) -> None:
        self.whole = whole

    def reset(self, i: int) -> None:
        self.whole.reset(i)
        for j in (i, i + 1):
            self.whole.step.run(j)
            self.whole.step.reset(j)
        self.whole.step.reset(i)

    def run(self, i: int) -> None:
        self.whole.step.run(i)


def cases(steps: dict[str, Step], count: int) -> dict[str, common.Case]:
    """What is timed of each column's step: itself, or ``count`` of it and a later one."""
    if count == 1:
        return dict(steps)
    whole = {column: Whole(step, count) for column, step in steps.items()}
    return {**whole, **{column + LATER: Later(step) for column, step in whole.items()}}


def summary(times: dict[str, list[common.Time]], column: str, count: int) -> dict[str, Any]:
    """Of a column: medians, and of several micro-batches a later one's and what a step takes beyond as many of it."""
    found = common.summary(times[column])
    if count > 1:
        later = common.summary(times[column + LATER])["ms"]
        found |= {"later_ms": later, "once_ms": found["ms"] - count * later}
    return found


def lines(result: dict[str, Any], columns: Sequence[str]) -> list[list[str]]:
    """Rows of a table: how many times BF16's speed a later micro-batch has, and ms that are spent once a step."""
    measured = {column: data for column, data in result["columns"].items() if "later_ms" in data}
    if common.BASELINE not in measured:
        return []
    exact = measured[common.BASELINE]["later_ms"]
    return [["  a later micro-batch", f"{exact:.3f}",
             *(f"{exact / measured[c]['later_ms']:.2f}" if c in measured else "" for c in columns)],
            ["  once a step, ms", "", *(f"{measured[c]['once_ms']:.3f}" if c in measured else "" for c in columns)]]
