"""What a quantiser computes, as one frozen value.

A ``QuantSpec`` names an element format, the block that shares a scale, the scale's format and
rule, and the rounding. It travels through graphs as its string form (``str(spec)``), so a dumped
graph reads like the recipe that made it; ``QuantSpec.parse`` is the inverse.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

ELEMENTS = ("e2m1", "e4m3", "e5m2")
SCALES = ("e8m0", "fp32")
BLOCKS = (16, 32, 64, 128)
WHOLES = ("row", "tensor")
RULES = ("floor", "ceil", "headroom", "quest", "amax", "amax_pow2")
AMAX_RULES = ("amax", "amax_pow2")
ROUNDINGS = ("nearest", "stochastic")
SIGMAS = ("centred", "guarded", "rms")
POWERS = ("floor", "nearest")

ELEMENT_BITS = {"e2m1": 4, "e4m3": 8, "e5m2": 8}
ELEMENT_MAX = {"e2m1": 6.0, "e4m3": 448.0, "e5m2": 57344.0}
ELEMENT_EMAX = {"e2m1": 2, "e4m3": 8, "e5m2": 15}


def dtype_name(dtype: object) -> str:
    """``"bfloat16"`` of ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


class SpecError(ValueError):
    """A quantiser that does not exist; the message says what is possible."""


@dataclass(frozen=True)
class QuantSpec:
    """A quantiser along the last (contraction) axis of a 2-D tensor.

    Args:
        element: element format, one of ``ELEMENTS``.
        block: how many elements along that axis share one scale, one of ``BLOCKS`` (32 for the OCP MX formats), or
            ``"row"`` or ``"tensor"``: all that lie in one.
        scale: scale format, one of ``SCALES``: ``"e8m0"`` of a block, ``"fp32"`` of a row or a tensor.
        rule: how the scale follows from those elements, one of ``RULES``. ``amax``: the largest magnitude becomes the
            largest that the format holds; ``amax_pow2``: with the multiplier rounded down to a power of two.
        rounding: ``"nearest"`` (ties to even code) or ``"stochastic"``.
        sigma: block deviation of the ``quest`` rule: ``"centred"`` (as released),
            ``"guarded"`` (centred, but at least ``mean(x²)/16``) or ``"rms"``.
        power: how the ``quest`` scale becomes a power of two.
        mask: also return the 1-bit mask of the elements that were not clipped.

    ``sigma`` and ``power`` say nothing under another rule than ``quest`` and take their defaults there.
    """

    element: str = "e2m1"
    block: Any = 32
    scale: str = "e8m0"
    rule: str = "ceil"
    rounding: str = "nearest"
    sigma: str = "guarded"
    power: str = "floor"
    mask: bool = False

    def __post_init__(self) -> None:
        for field, legal in (
            ("element", ELEMENTS),
            ("scale", SCALES),
            ("rule", RULES),
            ("rounding", ROUNDINGS),
            ("sigma", SIGMAS),
            ("power", POWERS),
        ):
            value = getattr(self, field)
            if value not in legal:
                raise SpecError(f"quantiser {field} {value!r} does not exist; possible: {', '.join(legal)}")
        if not isinstance(self.block, (int, str)) or self.block not in (*BLOCKS, *WHOLES):
            raise SpecError(f"quantiser block {self.block!r} is not possible; use 16, 32, 64 or 128, or 'row' or "
                            "'tensor' with scale 'fp32'")
        self._check_scale()
        if self.rule in ("quest", "headroom") and self.element != "e2m1":
            raise SpecError(f"scale rule {self.rule!r} is defined for e2m1 only, not {self.element}; "
                            "use 'floor' or 'ceil'")
        if self.mask and self.rule not in ("quest", "floor"):
            raise SpecError(f"scale rule {self.rule!r} never clips, so it has no clip mask; use mask=False")
        if self.rounding == "stochastic" and self.element != "e2m1":
            raise SpecError(f"stochastic rounding is defined for e2m1 only, not {self.element}")
        if self.rule != "quest":
            object.__setattr__(self, "sigma", QuantSpec.sigma)
            object.__setattr__(self, "power", QuantSpec.power)

    def _check_scale(self) -> None:
        if (self.scale == "fp32") != (self.block in WHOLES):
            raise SpecError(f"scale {self.scale!r} with block {self.block!r} does not exist; 'e8m0' scales belong to "
                            "blocks of 16, 32, 64 or 128, 'fp32' scales to 'row' or 'tensor'")
        if (self.scale == "fp32") != (self.rule in AMAX_RULES):
            possible = AMAX_RULES if self.scale == "fp32" else tuple(r for r in RULES if r not in AMAX_RULES)
            raise SpecError(f"scale rule {self.rule!r} gives no {self.scale} scale; possible: {', '.join(possible)}")
        if self.scale == "fp32" and self.element == "e2m1":
            raise SpecError("fp32 scales of a row or a tensor are defined for e4m3 and e5m2, not e2m1; "
                            "give e2m1 blocks with 'e8m0' scales")

    @property
    def bits(self) -> int:
        """Bits an element's code takes."""
        return ELEMENT_BITS[self.element]

    @property
    def max(self) -> float:
        """Largest finite magnitude of the element format."""
        return ELEMENT_MAX[self.element]

    @property
    def gain(self) -> float:
        """Factor that a GEMM carries for this operand (4/3 for ``headroom``, else 1)."""
        return 4.0 / 3.0 if self.rule == "headroom" else 1.0

    @property
    def stochastic(self) -> bool:
        return self.rounding == "stochastic"

    @property
    def blocked(self) -> bool:
        """Whether blocks along the contraction axis have the scales, not rows or the tensor."""
        return self.block in BLOCKS

    @property
    def multiple(self) -> int:
        """What the contraction axis is zero-padded to a multiple of."""
        return int(self.block) if self.blocked else 1

    @property
    def commutes_with_transpose(self) -> bool:
        """Whether the codes of ``Xᵀ`` are the transposed codes of ``X`` under the same scales."""
        return self.block == "tensor"

    def __str__(self) -> str:
        rule = f"quest({self.sigma},{self.power})" if self.rule == "quest" else self.rule
        tail = " mask" if self.mask else ""
        return f"{self.element}/{self.block} {self.scale} {rule} {self.rounding}{tail}"

    @staticmethod
    @cache
    def parse(text: str) -> QuantSpec:
        """Read ``str(spec)`` back. Raises SpecError with the expected form."""
        m = re.fullmatch(r"(\w+)/(\w+) (\w+) (\w+)(?:\((\w+),(\w+)\))? (\w+)( mask)?", text)
        if m is None:
            raise SpecError(f"cannot read quantiser {text!r}; expected 'element/block scale rule rounding [mask]', "
                            "for example 'e2m1/32 e8m0 quest(guarded,floor) nearest mask' or "
                            "'e4m3/tensor fp32 amax nearest'")
        element, block, scale, rule, sigma, power, rounding, mask = m.groups()
        return QuantSpec(element, int(block) if block.isdecimal() else block, scale, rule, rounding,
                         sigma or QuantSpec.sigma, power or QuantSpec.power, mask is not None)
