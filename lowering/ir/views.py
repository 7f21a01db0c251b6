"""Nodes of the quantised IR as values with names: ``of`` reads a node, ``emit`` writes one.

Only here, and elsewhere in ``lowering/ir``, the arguments of our own ops have positions. A quantiser is text in a graph
and a :class:`QuantSpec` in a view.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import torch
from torch.fx import Node

from quartet.kernels.spec import QuantSpec
from quartet.lowering import ir
from quartet.lowering.ir.graph import Builder, arguments, parameters
from quartet.lowering.ir.ops import gathered, grouped
from quartet.runtime.compat import OpOverload


@dataclass(frozen=True)
class View:
    """A call of :attr:`op`; the fields of a subclass are the operator's arguments, by name and in order."""

    op: ClassVar[OpOverload]

    @classmethod
    def of(cls, node: Node) -> Self:
        """Read a node.

        Raises:
            TypeError: it calls another operator.
        """
        if node.target is not cls.op:
            raise TypeError(f"{node.format_node()} is no {cls.op}")
        given = arguments(node)
        return cls(**{f.name: QuantSpec.parse(given[f.name]) if f.name == "spec" else given[f.name]
                      for f in fields(cls)})

    def emit(self, build: Builder) -> Node:
        """The node, where ``build`` inserts."""
        return call(build, self.op, {f.name: getattr(self, f.name) for f in fields(self)})


def call(build: Builder, op: OpOverload, given: Mapping[str, Any]) -> Node:
    """A call with arguments by name, without those at the end that are what the operator takes by default."""
    values, left_out = [], True
    for name, default in reversed(parameters(op)):
        left_out = left_out and given[name] is default
        if not left_out:
            value = given[name]
            values.append(str(value) if isinstance(value, QuantSpec) else build.size(value))
    return build(op, *reversed(values))


@dataclass(frozen=True)
class Signs(View):
    op = ir.SIGNS
    seed: Node
    site: int
    n: int


@dataclass(frozen=True)
class FixedSigns(View):
    op = ir.FIXED_SIGNS
    signs: list[int]
    device: torch.device


@dataclass(frozen=True)
class Hadamard(View):
    op = ir.HADAMARD
    x: Node
    n: int
    signs: Node | None
    inverse: bool
    dtype: torch.dtype

    @staticmethod
    def into(x: Node) -> Hadamard | None:
        """The transform into a rotated basis whose result ``x`` is; None where it is none, or the way back from one."""
        if x.target is not ir.HADAMARD:
            return None
        found = Hadamard.of(x)
        return None if found.inverse else found


@dataclass(frozen=True)
class Quantize(View):
    """``amax`` where the spec takes one."""

    op = ir.QUANTIZE
    x: Node
    spec: QuantSpec
    seed: Node | None = None
    site: int = 0
    amax: Node | None = None


@dataclass(frozen=True)
class QuantizeGroups(View):
    op = grouped.QUANTIZE_GROUPS
    x: Node
    spec: QuantSpec
    ends: Node


@dataclass(frozen=True)
class Dequantize(View):
    op = ir.DEQUANTIZE
    codes: Node
    scales: Node
    spec: QuantSpec
    dtype: torch.dtype
    amax: Node | None = None

    @property
    def stored(self) -> tuple[Node, Node, str]:
        """What every op on packed codes takes first."""
        return self.codes, self.scales, str(self.spec)


@dataclass(frozen=True)
class ApplyMask(View):
    op = ir.APPLY_MASK
    x: Node
    mask: Node


@dataclass(frozen=True)
class GatheredWeight(View):
    """``mask`` and ``amax`` where the spec has them; ``signs`` of the rotation before the quantiser, if it has any."""

    op = gathered.GATHERED
    codes: Node
    scales: Node
    mask: Node | None
    amax: Node | None
    spec: QuantSpec
    rotation: int
    signs: list[int] | None
    cols: int
    dtype: torch.dtype


VIEWS: tuple[type[View], ...] = (Signs, FixedSigns, Hadamard, Quantize, QuantizeGroups, Dequantize, ApplyMask,
                                 GatheredWeight)
