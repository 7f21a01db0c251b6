"""What an op of an inspected graph computes from its tensors, as text that stands in the graph.

A program is a list of measurements, each of which names its tensors by their position:

    operand      statistics of what one quantiser reads (``quartet.kernels.reference.statistics``), to its very bits:
                 the same rotation, random numbers and largest magnitude
    keep         a part of X and W for the gradients of the step; forward alone has them
    product      cosine and relative error of a gradient against the product of the unquantised operands, of that part
    what-if      relative error of X, W or E under the quantisers of other recipes
    alignment    |cos| between the two weights of a gated layer
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Protocol
from urllib.parse import unquote

from torch import Tensor

from quartet.kernels.reference import statistics
from quartet.runtime.inspect.calls import Call
from quartet.runtime.inspect.gradients import Keep, Product
from quartet.runtime.inspect.operands import Matrix, Operand, Stored
from quartet.runtime.inspect.what_if import Quantiser, WhatIf

__all__ = ["Alignment", "Keep", "Matrix", "Operand", "Product", "Quantiser", "Stored", "WhatIf", "parsed", "written"]


class Measurement(Protocol):
    """A line of a program."""

    def run(self, tensors: Sequence[Tensor], call: Call) -> None: ...


@dataclass(frozen=True)
class Alignment:
    """The weights of the two layers of a gated activation."""

    names: tuple[str, ...]
    gate: Matrix
    linear: Matrix

    def run(self, tensors: Sequence[Tensor], call: Call) -> None:
        call.put("alignment", (" and ".join(map(call.rename, self.names)),),
                 statistics.alignment(self.gate.of(tensors), self.linear.of(tensors)))


_KINDS = {kind.__name__: kind for kind in (Operand, Keep, Product, WhatIf, Alignment)}
_PARTS: dict[str, Any] = {"stored": Stored, **dict.fromkeys(("x", "w", "e", "out", "gate", "linear"), Matrix)}


def written(program: Sequence[Any]) -> str:
    """A program as text, without what Inductor's C++ would have to escape: JSON with ``'`` for its quotes."""
    text = json.dumps([[type(one).__name__, _fields(one)] for one in program], separators=(",", ":"))
    return shown(text.replace("%", "%25").replace("'", "%27").replace('"', "'"), "\\")


def shown(text: str, signs: str = '%"\\') -> str:
    """Text with such signs as ``%`` and two digits, which ``urllib.parse.unquote`` undoes: Inductor puts what an op is
    given between quotes of C++ as it is (PyTorch 2.13)."""
    return "".join(f"%{ord(sign):02X}" if sign in signs or ord(sign) < 32 else sign for sign in text)


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
                 for kind, given in json.loads(unquote(text.replace("'", '"'))))


def _part(key: str, value: Any) -> Any:
    if key == "quantisers":
        return tuple(Quantiser(**one) for one in value)
    if isinstance(value, dict):
        return _PARTS[key](**value)
    return tuple(value) if isinstance(value, list) else value
