"""What an op of an inspected graph computes from its tensors, as text that stands in the graph.

A program is a list of measurements, each of which names its tensors by their position:

    operand      statistics of what one quantiser reads (``quartet.kernels.reference.statistics``), to its very bits:
                 the same rotation, random numbers and largest magnitude
    keep         64 columns of X and W for the gradients of the step; forward alone has them
    product      cosine and relative error of a gradient against the product of the unquantised operands, of those
                 columns
    what-if      relative error of X, W or E under the quantisers of other recipes
    alignment    |cos| between the two weights of a gated layer
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from quartet.kernels import reference
from quartet.kernels.reference import statistics
from quartet.kernels.spec import QuantSpec
from quartet.runtime.inspect.calls import Call

SAMPLE = 64  # columns of a product that are compared


class Measurement(Protocol):
    """A line of a program."""

    def run(self, tensors: Sequence[Tensor], call: Call) -> None: ...


@dataclass(frozen=True)
class Stored:
    """A tensor that is made from codes: dequantised to ``dtype``, ``cols`` columns of it, transposed."""

    scales: int
    spec: str
    dtype: str
    amax: int | None = None
    cols: int | None = None
    turned: bool = False

    def of(self, codes: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        amax = None if self.amax is None else tensors[self.amax]
        values = reference.dequantize(codes, tensors[self.scales], QuantSpec.parse(self.spec),
                                      getattr(torch, self.dtype), amax=amax)
        values = values if self.cols is None else values[:, :self.cols]
        return values.t() if self.turned else values


@dataclass(frozen=True)
class Operand:
    names: tuple[str, ...]
    x: int
    spec: str
    rotation: int = 0
    signs: int | None = None
    seed: int | None = None
    site: int = 0
    amax: int | None = None
    stored: Stored | None = None

    def run(self, tensors: Sequence[Tensor], call: Call) -> None:
        x, signs, seed, amax = (None if i is None else tensors[i] for i in (self.x, self.signs, self.seed, self.amax))
        assert x is not None
        x = x if self.stored is None else self.stored.of(x, tensors)
        if self.rotation:
            x = reference.hadamard(x, self.rotation, signs)
        call.put("operand", tuple(map(call.rename, self.names)),
                 statistics.operand_statistics(x, QuantSpec.parse(self.spec), seed, self.site, amax))


@dataclass(frozen=True)
class Matrix:
    """A tensor in normal orientation: its position, and whether it lies transposed."""

    at: int
    flipped: bool = False

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[self.at].t() if self.flipped else tensors[self.at]


@dataclass(frozen=True)
class Keep:
    """Columns of X ``[tokens, in]`` and W ``[out, in]``."""

    layer: str
    x: Matrix
    w: Matrix

    def run(self, tensors: Sequence[Tensor], call: Call) -> None:
        call.kept[self.layer] = tuple(sample(m.of(tensors)).float() for m in (self.x, self.w))


@dataclass(frozen=True)
class Product:
    """``out``, the gradient of X ``[tokens, in]`` or of W ``[out, in]``, against E·W or Eᵀ·X; E ``[tokens, out]``."""

    name: str
    layer: str
    of_weight: bool
    e: Matrix
    out: Matrix

    def run(self, tensors: Sequence[Tensor], call: Call) -> None:
        if self.layer not in call.kept:
            return
        x, w = call.kept[self.layer]
        e, got = self.e.of(tensors).float(), sample(self.out.of(tensors)).float()
        exact = e.t() @ x if self.of_weight else e @ w
        call.put("product", (call.rename(self.name),),
                 torch.stack((statistics.cosine(got, exact), statistics.relative_error(got, exact))))


@dataclass(frozen=True)
class Quantiser:
    """One operand of one product under another recipe: what fprop does to the tensor first, and the quantiser."""

    name: str
    spec: str | None
    rotation: int = 0
    signs: int | None = None
    transposed: bool = False
    first: tuple[str, int, int | None] | None = None

    def error(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """Σ(q − x)² / Σx² of everything that is done to x; None for ``spec``: only what fprop does."""
        q = x
        if self.first is not None:
            spec, rotation, signs = self.first
            x = _rotated(x, rotation, signs, tensors)
            q = _quantised(x, spec)
        if self.transposed:
            q, x = q.t(), x.t()
        if self.spec is not None:
            x = _rotated(x, self.rotation, self.signs, tensors)
            q = _quantised(_rotated(q, self.rotation, self.signs, tensors), self.spec)
        return statistics.relative_error(q, x)


@dataclass(frozen=True)
class WhatIf:
    """A tensor and what it could have been quantised by."""

    names: tuple[str, ...]
    x: Matrix
    quantisers: tuple[Quantiser, ...]

    def run(self, tensors: Sequence[Tensor], call: Call) -> None:
        x = self.x.of(tensors)
        for one in self.quantisers:
            names = tuple(f"{call.rename(name)} {one.name}" for name in self.names)
            call.put("what-if", names, one.error(x, tensors).reshape(1))


@dataclass(frozen=True)
class Alignment:
    names: tuple[str, ...]
    gate: Matrix
    linear: Matrix

    def run(self, tensors: Sequence[Tensor], call: Call) -> None:
        call.put("alignment", (" and ".join(map(call.rename, self.names)),),
                 statistics.alignment(self.gate.of(tensors), self.linear.of(tensors)))


def _rotated(x: Tensor, n: int, signs: int | None, tensors: Sequence[Tensor]) -> Tensor:
    return reference.hadamard(x, n, None if signs is None else tensors[signs]) if n else x


def _quantised(x: Tensor, text: str) -> Tensor:
    """The values of the codes, of the shape of x; stochastic ones by a fixed seed."""
    spec = QuantSpec.parse(text)
    seed = torch.ones(1, dtype=torch.int64, device=x.device) if spec.stochastic else None
    codes, scales, amax = statistics.quantized(x, spec, seed, 0, None)
    return reference.dequantize(codes, scales, spec, amax=amax)[:, :x.shape[1]]


def sample(x: Tensor) -> Tensor:
    """A copy of at most :data:`SAMPLE` columns, evenly spaced."""
    columns = x.shape[1]
    at = torch.arange(min(columns, SAMPLE), device=x.device) * columns // min(columns, SAMPLE)
    return x.index_select(1, at)


_KINDS = {kind.__name__: kind for kind in (Operand, Keep, Product, WhatIf, Alignment)}
_PARTS: dict[str, Any] = {"stored": Stored, **dict.fromkeys(("x", "w", "e", "out", "gate", "linear"), Matrix)}


def written(program: Sequence[Any]) -> str:
    """A program as text."""
    return json.dumps([[type(one).__name__, _fields(one)] for one in program], separators=(",", ":"))


def _fields(one: Any) -> Any:
    """The fields of a record that are not what they are by default."""
    if isinstance(one, tuple):
        return [_fields(each) for each in one]
    if not is_dataclass(one):
        return one
    return {f.name: _fields(value) for f in fields(one) if (value := getattr(one, f.name)) != f.default}


@cache
def parsed(text: str) -> tuple[Measurement, ...]:
    """The inverse of :func:`written`."""
    return tuple(_KINDS[kind](**{key: _part(key, value) for key, value in given.items()})
                 for kind, given in json.loads(text))


def _part(key: str, value: Any) -> Any:
    if key == "quantisers":
        return tuple(Quantiser(**one) for one in value)
    if isinstance(value, dict):
        return _PARTS[key](**value)
    return tuple(value) if isinstance(value, list) else value
