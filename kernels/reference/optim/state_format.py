"""How an optimizer state is stored, as one frozen value that prints and parses.

=====================  ==============================================================================================
``fp32`` ``bf16``      plain numbers
``e4m3`` ``e5m2``      FP8, one scale a tensor (m in E4M3 and v in E5M2 is the pair of arXiv 2409.12517)
``e4m3/256``           FP8 in blocks of 256 (64, 128, 512 too), one scale each
``dynamic/256``        the 8-bit dynamic map of arXiv 2110.02861, blocks of 256
``e4m3/128 expanded``  COAT's dynamic range expansion (arXiv 2410.19313), groups of 128; also ``coat``
``fp16``               half precision with one power-of-two scale a tensor: master weights
=====================  ==============================================================================================
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from quartet.kernels.spec import SpecError

ELEMENTS = ("fp32", "bf16", "fp16", "e4m3", "e5m2", "dynamic")
PLAIN = ("fp32", "bf16")
BLOCKS = (64, 128, 256, 512)
SCALINGS = ("delayed", "current")
TILE = 256  # elements that are processed together where no scale says how many
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0, "fp16": 65504.0}
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "e4m3": 1, "e5m2": 1, "dynamic": 1}
_ALIASES = {"dynamic": "dynamic/256", "coat": "e4m3/128 expanded"}


@dataclass(frozen=True)
class StateFormat:
    """Storage of one optimizer state.

    Args:
        element: one of ``ELEMENTS``.
        block: elements that share a scale, one of ``BLOCKS``, counted along the flattened trailing dimensions of a row;
            None: one scale a tensor, or none for ``fp32`` and ``bf16``.
        expand: range expansion, ``sign(x) · 448 · (|x|/M)^k`` with M and k of each group; ``e4m3`` in blocks only.
        scaling: of one scale a tensor. ``"delayed"``: from the largest magnitude of the step before, with a factor of
            two in hand (saturating beyond), so that one pass over memory is enough; ``"current"``: from this step's,
            which a first pass over gradient and codes finds.
    Raises:
        SpecError: a combination that does not exist.
    """

    element: str = "e4m3"
    block: int | None = None
    expand: bool = False
    scaling: str = "delayed"

    def __post_init__(self) -> None:
        if self.element not in ELEMENTS:
            raise SpecError(f"state element {self.element!r} does not exist; possible: {', '.join(ELEMENTS)}")
        if self.scaling not in SCALINGS:
            raise SpecError(f"state scaling {self.scaling!r} does not exist; possible: {', '.join(SCALINGS)}")
        if self.block is not None and self.block not in BLOCKS:
            raise SpecError(f"a state block of {self.block!r} elements is not possible; use 64, 128, 256 or 512, "
                            "or None for one scale a tensor")
        if self.block is not None and self.element not in ("e4m3", "e5m2", "dynamic"):
            raise SpecError(f"a {self.element} state has no blocks; use block=None")
        if self.block is None and self.element == "dynamic":
            raise SpecError("the dynamic map needs blocks; use block=256")
        if self.expand and (self.element != "e4m3" or self.block is None):
            raise SpecError(f"range expansion is defined for e4m3 in blocks, not {self.element} with block="
                            f"{self.block}; use StateFormat('e4m3', 128, expand=True)")
        if self.scaling == "current" and not self.per_tensor:
            raise SpecError(f"scaling='current' is of one scale a tensor, which {self.element} with block={self.block} "
                            "does not have; leave it out")

    @property
    def plain(self) -> bool:
        """Whether the values are stored as they are, without a scale."""
        return self.element in PLAIN

    @property
    def per_tensor(self) -> bool:
        """Whether one scale serves the whole tensor."""
        return not self.plain and self.block is None

    @property
    def tile(self) -> int:
        """Elements that are processed together."""
        return self.block or TILE

    @property
    def bytes_per_element(self) -> float:
        """Bytes of an element with its share of the scales, of a large tensor whose rows are whole blocks."""
        scale = 0.0 if self.block is None else (8.0 if self.expand else 4.0) / self.block
        return BYTES[self.element] + scale

    def __str__(self) -> str:
        if self.plain:
            return self.element
        tail = " expanded" if self.expand else " current" if self.scaling == "current" else ""
        return f"{self.element}/{self.block or 'tensor'}{tail}"

    @staticmethod
    @cache
    def parse(text: str) -> StateFormat:
        """Read ``str(format)`` or a name of the table above. Raises SpecError with the expected form."""
        match = re.fullmatch(r"(\w+)(?:/(\w+))?(?: (expanded|current))?", _ALIASES.get(text, text))
        if match is None or not (match[2] is None or match[2] == "tensor" or match[2].isdecimal()):
            raise SpecError(f"cannot read state format {text!r}; expected 'fp32', 'bf16', 'e4m3', 'e5m2', 'e4m3/256', "
                            "'dynamic/256', 'e4m3/128 expanded' or 'e4m3/tensor current'")
        block = int(match[2]) if (match[2] or "").isdecimal() else None
        return StateFormat(match[1], block, match[3] == "expanded", "current" if match[3] == "current" else "delayed")

    @staticmethod
    def of(value: StateFormat | str) -> StateFormat:
        """A format, or the name of one. Raises SpecError."""
        if isinstance(value, StateFormat):
            return value
        if isinstance(value, str):
            return StateFormat.parse(value)
        raise SpecError(f"a state format is a StateFormat or its name, not {value!r}")


FP32 = StateFormat("fp32")
E4M3_E5M2 = (StateFormat("e4m3"), StateFormat("e5m2"))
E4M3_BLOCKS = StateFormat("e4m3", 256)
COAT = StateFormat("e4m3", 128, expand=True)
DYNAMIC = StateFormat("dynamic", 256)
FP16_MASTER = StateFormat("fp16")
