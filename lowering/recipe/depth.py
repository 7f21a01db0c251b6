"""Some of the layers of a stack, in words: ``"last 15%"``, ``"first 2"``."""

from __future__ import annotations

import re
from math import ceil

from quartet.kernels.spec import SpecError

Layer = tuple[int, int]  # (index, how many there are)
_FORM = re.compile(r"(first|last) ([1-9]\d*)(%?)")


def normalise_depth(text: object) -> str:
    """``text`` if it says which layers. Raises SpecError with the expected form."""
    found = _FORM.fullmatch(text) if isinstance(text, str) else None
    if found is None or (found[3] and int(found[2]) > 100):
        raise SpecError(f"layers {text!r} is not possible; write 'first 2', 'last 1', 'first 10%' or 'last 15%'")
    return found[0]


def is_within(layer: Layer, text: str) -> bool:
    """Whether a layer is one of those; a share of a layer counts as a whole one."""
    found = _FORM.fullmatch(text)
    assert found is not None
    index, count = layer
    some = ceil(count * int(found[2]) / 100) if found[3] else int(found[2])
    return index < some if found[1] == "first" else index >= count - some
