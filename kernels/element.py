"""Element formats, as a table: the built-in ones and those that a program registers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import floor, isfinite, log2

import torch
from torch import Tensor

from quartet.kernels import extension
from quartet.kernels.extension import ExtensionError

_KIND = "element"
_STORAGES = (torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Element:
    """The numbers that a code can be.

    Args:
        name: as in ``"e2m3/32 e8m0 ceil nearest"``: lower-case letters and digits.
        bits: of a code.
        max: largest finite magnitude.
        storage: dtype of the codes, one a byte: uint8, int8, float8_e4m3fn or float8_e5m2.
        emax: exponent of ``max``, for scales that are powers of two; None: it has none of them.
        encode: fp32 → codes, elementwise, to nearest, saturating at ±max. None: PyTorch's conversion to ``storage``.
        decode: codes → fp32, elementwise. None: PyTorch's conversion.
        packed: two codes to a byte; ``e2m1`` only.
    """

    name: str
    bits: int
    max: float
    storage: torch.dtype
    emax: int | None = None
    encode: Callable[[Tensor], Tensor] | None = None
    decode: Callable[[Tensor], Tensor] | None = None
    packed: bool = False


_BUILT_IN = (
    Element("e2m1", 4, 6.0, torch.uint8, 2, packed=True),
    Element("e4m3", 8, 448.0, torch.float8_e4m3fn, 8),
    Element("e5m2", 8, 57344.0, torch.float8_e5m2, 15),
    Element("int8", 8, 127.0, torch.int8),
    Element("ternary", 8, 1.0, torch.int8),
)
ELEMENTS = {element.name: element for element in _BUILT_IN}


def register_element(element: Element) -> Element:
    """Let quantisers name ``element``, and return it; the same one again changes nothing.

    It goes with every scale that does not ask for a certain element: ``e8m0`` by ``floor`` or ``ceil`` where it has an
    ``emax``, ``fp32`` by ``amax``, ``amax_pow2`` or ``delayed``, rounded to nearest. Its functions are traced into
    compiled graphs, so they consist of PyTorch operations without branches on values.

    Raises:
        ExtensionError: a name that is taken, or functions that are not each other's inverse, do not round to nearest,
            do not saturate, or decode to what is no bfloat16 number; with the value.
    """
    if not isinstance(element, Element):
        raise ExtensionError(f"expected a quartet.extend.Element, not {type(element).__name__} {element!r}")
    if ELEMENTS.get(element.name) == element:
        return element
    extension.check_name(_KIND, element.name, ELEMENTS)
    _check(element)
    ELEMENTS[element.name] = element
    facts = element.bits, element.max, element.storage, element.emax
    extension.add(_KIND, element.name, facts, element.encode, element.decode)
    return element


def unregister_element(name: str) -> None:
    """Forget a registered element. Raises ExtensionError where there is none of that name."""
    extension.remove(_KIND, name)
    del ELEMENTS[name]


def encode(x: Tensor, element: Element) -> Tensor:
    """Codes, one a byte, to nearest even of fp32 values, saturating. NaN stays NaN in a float8 and is 0 in int8."""
    if element.encode is not None:
        return element.encode(x)
    x = x.clamp(-element.max, element.max)
    if not element.storage.is_floating_point:
        x = torch.where(x.isnan(), 0.0, x.round())
    return x.to(element.storage)


def decode(codes: Tensor, element: Element, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of codes, one a byte."""
    return (codes if element.decode is None else element.decode(codes)).to(dtype)


def _check(element: Element) -> None:
    what = f"element {element.name!r}"
    if element.packed:
        raise ExtensionError(f"{what}: codes are packed in e2m1 only; use packed=False, one code a byte")
    if element.storage not in _STORAGES:
        raise ExtensionError(f"{what}: codes are not stored as {element.storage}; possible: "
                             f"{', '.join(map(str, _STORAGES))}")
    if (element.encode is None) != (element.decode is None):
        raise ExtensionError(f"{what} has one of encode and decode; give both or neither")
    if not isinstance(element.bits, int) or not 2 <= element.bits <= 8:
        raise ExtensionError(f"{what}: bits={element.bits!r} is not possible; use 2 to 8")
    if not isinstance(element.max, float) or not isfinite(element.max) or element.max <= 0:
        raise ExtensionError(f"{what}: max={element.max!r} is not possible; use a finite float above 0")
    if element.emax not in (None, floor(log2(element.max))):
        raise ExtensionError(f"{what}: emax={element.emax!r} is not the exponent of max={element.max}; use "
                             f"{floor(log2(element.max))}, or None for a format without e8m0 scales")
    _check_values(element, what)


def _check_values(element: Element, what: str) -> None:
    """That the functions are of the declared format, on all codes and on a fine grid."""
    integer = torch.uint8 if element.storage is torch.uint8 else torch.int8
    low = 0 if integer is torch.uint8 else -(1 << element.bits - 1)
    codes = torch.arange(low, low + (1 << element.bits), dtype=torch.int16, device="cpu")
    codes = codes.to(integer).view(element.storage)
    values = decode(codes, element)
    if values.shape != codes.shape or (element.decode is not None and element.decode(codes).dtype != torch.float32):
        raise ExtensionError(f"{what}: decode is elementwise from {element.storage} to float32")
    values = values[values.abs() <= element.max].unique()
    if values.numel() == 0 or float(values.abs().max()) != element.max:
        largest = float(values.abs().max()) if values.numel() else None
        raise ExtensionError(f"{what}: the largest value of its {1 << element.bits} codes, up to max={element.max}, is "
                             f"{largest}, and has to be max itself")
    if not torch.equal(values.to(torch.bfloat16).to(torch.float32), values):
        wrong = float(values[values.to(torch.bfloat16).to(torch.float32) != values][0])
        raise ExtensionError(f"{what}: the value {wrong} is no bfloat16 number, so products would not be exact")
    grid = torch.linspace(-1.5, 1.5, 4001, dtype=torch.float32, device="cpu") * element.max
    x = torch.cat((values, grid, grid.new_tensor([1e30, -1e30])))
    made = encode(x, element)
    if made.shape != x.shape or made.dtype != element.storage:
        raise ExtensionError(f"{what}: encode is elementwise from float32 to {element.storage}; it gave "
                             f"{made.dtype} {list(made.shape)} of {list(x.shape)}")
    error = (decode(made, element) - x).abs()
    best = (x.unsqueeze(1) - values).abs().amin(1)
    wrong_at = (error != best).nonzero()
    if wrong_at.numel():
        at = int(wrong_at[0])
        raise ExtensionError(f"{what}: encode is to nearest and saturates, but {float(x[at])} becomes "
                             f"{float(decode(made, element)[at])}")
