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

from quartet.kernels import extension
from quartet.kernels.element import ELEMENTS, Element

SCALES = ("e8m0", "e4m3", "fp32")
BLOCKS = (16, 32, 64, 128)
WHOLES = ("row", "tensor")
RULES = ("floor", "ceil", "headroom", "quest", "even", "amax", "amax_pow2", "delayed", "absmean", "four_six", "eden")
ROUNDINGS = ("nearest", "stochastic")
SIGMAS = ("centred", "guarded", "rms")
POWERS = ("floor", "nearest")

# scale → rule → the scale, for a the largest magnitude under it, M and 2^e the element format's and its power of two
RULES_OF_SCALE = {
    "e8m0": {
        "floor": "2^(⌊log2 a⌋ − e); what lies above M becomes M",
        "ceil": "2^⌈log2(a/M)⌉: nothing lies above M",
        "headroom": "4/3 · 2^(⌊log2 a⌋ − e): nothing lies above M; the product carries the 4/3",
        "quest": "2^⌊log2 t⌋ (floor) or 2^⌊log2 t + ½⌋ (nearest), t = 0.487 σ + 10⁻⁸, σ the block's deviation about "
                 "its mean (centred), about 0 (rms), or at least a quarter of that (guarded)",
        "even": "2^(⌊log2 a'⌋ − 2), a' = a to the nearest of 2^k and 1.5 · 2^k; what lies above M becomes M",
    },
    "e4m3": {
        "amax": "a/6 in units of t/(448 · 6), t the largest magnitude of the tensor, rounded to E4M3",
        "four_six": "that, with 256 for 448, or the scale that maps a to 4, by the smaller squared error",
        "eden": "that, with 256 for 448 and a mild clip, times Σx²/Σx·q of 128 elements, rounded at random",
    },
    "fp32": {
        "amax": "a/M",
        "amax_pow2": "a/M, rounded up to a power of two",
        "delayed": "a/M, a the largest of earlier steps in place of this one's",
        "absmean": "the mean magnitude",
    },
}
_CLIPPING = ("floor", "quest", "even")  # elements may lie beyond the format's largest magnitude
_E2M1_ONLY = ("quest", "headroom", "even")
EDEN_GROUP = 128  # elements over which the eden rule corrects the length of what it rounded
_ROUNDED_BY_RULE = ("eden",)  # stochastic in their scales, to nearest in their codes


def dtype_name(dtype: object) -> str:
    """``"bfloat16"`` of ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


class SpecError(ValueError):
    """A quantiser that does not exist; the message says what is possible."""


@dataclass(frozen=True)
class QuantSpec:
    """A quantiser along the last (contraction) axis of a 2-D tensor.

    Args:
        element: element format, one of ``ELEMENTS``, registered ones among them.
        block: how many elements along that axis share one scale, one of ``BLOCKS`` (32 for the OCP MX formats, 16 for
            NVFP4), or ``"row"`` or ``"tensor"``: all that lie in one.
        scale: scale format, one of ``SCALES``: ``"e8m0"`` of a block; ``"e4m3"`` of a block of 16, times one fp32
            number for the tensor; ``"fp32"`` of a row, a tensor or a block.
        rule: how the scale follows from those elements, one of ``RULES_OF_SCALE[scale]``, which has the equations.
        rounding: ``"nearest"`` (ties to even code) or ``"stochastic"``.
        sigma: block deviation of the ``quest`` rule: ``"centred"`` (as released),
            ``"guarded"`` (centred, but at least ``mean(x²)/16``) or ``"rms"``.
        power: how the ``quest`` scale becomes a power of two.
        mask: also return the 1-bit mask of the elements that were not clipped.
        tile: ``block`` rows share the scale too: squares, whose codes are the same in both orientations.

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
    tile: bool = False

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
        self._check_element()
        if self.mask and self.rule not in _CLIPPING:
            raise SpecError(f"scale rule {self.rule!r} never clips, so it has no clip mask; use mask=False")
        if self.rule != "quest":
            object.__setattr__(self, "sigma", QuantSpec.sigma)
            object.__setattr__(self, "power", QuantSpec.power)

    def _check_scale(self) -> None:
        if self.rule not in RULES_OF_SCALE[self.scale]:
            raise SpecError(f"scale rule {self.rule!r} gives no {self.scale} scale; possible: "
                            f"{', '.join(RULES_OF_SCALE[self.scale])}")
        if self.scale != "fp32" and self.block in WHOLES:
            raise SpecError(f"scale {self.scale!r} with block {self.block!r} does not exist; 'e8m0' scales belong to "
                            "blocks of 16, 32, 64 or 128, 'fp32' scales to 'row', 'tensor' or such blocks")
        if self.scale == "e4m3" and (self.element, self.block) != ("e2m1", 16):
            raise SpecError(f"scale 'e4m3' belongs to e2m1 in blocks of 16 (NVFP4), not to {self.element}/{self.block}")
        if self.rule in ("delayed", "absmean") and self.block != "tensor":
            raise SpecError(f"scale rule {self.rule!r} gives one scale a tensor, not one a {self.block}; "
                            "use block='tensor'")
        if self.tile and (self.block in WHOLES or self.scale == "e8m0" or self.rule in ("four_six", "eden")):
            raise SpecError(f"tiles of {self.block} by {self.block} with scale {self.scale!r} and rule {self.rule!r} "
                            "do not exist; tile=True goes with blocks, scale 'fp32' (amax, amax_pow2) or 'e4m3' (amax)")

    def _check_element(self) -> None:
        if self.rule in _E2M1_ONLY and self.element != "e2m1":
            raise SpecError(f"scale rule {self.rule!r} is defined for e2m1 only, not {self.element}; "
                            "use 'floor' or 'ceil'")
        if self.scale == "e8m0" and self.format.emax is None:
            raise SpecError(f"{self.element} has no 'e8m0' scales; it has 'fp32' scales")
        if (self.element == "ternary") != (self.rule == "absmean"):
            raise SpecError(f"ternary codes and scale rule 'absmean' belong together; got {self.element} and "
                            f"{self.rule!r}")
        if self.scale == "fp32" and self.element == "e2m1" and (self.block == "tensor" or self.tile):
            raise SpecError("e2m1 has no fp32 scale of a tensor or a tile; give it blocks, or 'row' with scale 'fp32'")
        if self.stochastic and self.element != "e2m1":
            raise SpecError(f"stochastic rounding is defined for e2m1 only, not {self.element}")
        if self.rule in _ROUNDED_BY_RULE and not self.stochastic:
            raise SpecError(f"scale rule {self.rule!r} rounds its scales stochastically; use rounding='stochastic'")
        if self.stochastic and self.rule == "four_six":
            raise SpecError("scale rule 'four_six' chooses by the error of rounding to nearest, which biases "
                            "stochastic rounding; use rounding='nearest' or rule 'amax' or 'eden'")

    @property
    def format(self) -> Element:
        """The element format. Raises SpecError where it is registered no more."""
        found = ELEMENTS.get(self.element)
        if found is None:
            raise SpecError(f"element {self.element!r} of quantiser '{self}' is not registered in this process; import "
                            "the module that registers it")
        return found

    @property
    def bits(self) -> int:
        """Bits an element's code takes."""
        return self.format.bits

    @property
    def packed(self) -> bool:
        """Whether two codes share a byte; else each has one."""
        return self.format.packed

    @property
    def max(self) -> float:
        """Largest finite magnitude of the element format."""
        return self.format.max

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
        if self.rule == "eden":
            return EDEN_GROUP
        return int(self.block) if self.blocked else 2 if self.packed else 1

    @property
    def takes_amax(self) -> bool:
        """Whether the tensor's largest magnitude is an argument of the quantiser: half of a two-level scale, or the
        scale's only source."""
        return self.two_level or self.rule == "delayed"

    @property
    def two_level(self) -> bool:
        """Whether a factor of the tensor multiplies the scales of its blocks."""
        return self.scale == "e4m3"

    @property
    def exact_in_bf16(self) -> bool:
        """Whether ``code · scale`` of a block is a bf16 number, the tensor's factor left out."""
        return self.blocked and (self.scale != "fp32" or self.rule == "amax_pow2")

    @property
    def commutes_with_transpose(self) -> bool:
        """Whether the codes of ``Xᵀ`` are the transposed codes of ``X`` under the same scales."""
        return self.block == "tensor"

    @property
    def row_local(self) -> bool:
        """Whether the codes and scales of a row depend on that row alone."""
        return self.block != "tensor" and not self.tile and not self.takes_amax

    def __str__(self) -> str:
        rule = f"quest({self.sigma},{self.power})" if self.rule == "quest" else self.rule
        block = f"{self.block}x{self.block}" if self.tile else self.block
        tail = " mask" if self.mask else ""
        return f"{self.element}/{block} {self.scale} {rule} {self.rounding}{tail}"

    @staticmethod
    def parse(text: str) -> QuantSpec:
        """Read ``str(spec)`` back. Raises SpecError with the expected form."""
        return _parse(str(text), extension.changes())


def chain_multiple(spec: QuantSpec, rotation: int) -> int:
    """What a fused GPU quantiser pads its axis to a multiple of after a Hadamard of size ``rotation`` (0: none)."""
    return max(spec.multiple, rotation, 32 if spec.scale == "e8m0" else 16)


@cache
def _parse(text: str, changes: int) -> QuantSpec:
    m = re.fullmatch(r"(\w+)/([a-z]+|\d+?)(x\2)? (\w+) (\w+)(?:\((\w+),(\w+)\))? (\w+)( mask)?", text)
    if m is None:
        raise SpecError(f"cannot read quantiser {text!r}; expected 'element/block scale rule rounding [mask]', "
                        "for example 'e2m1/32 e8m0 quest(guarded,floor) nearest mask', "
                        "'e2m1/16x16 e4m3 amax nearest' or 'e4m3/tensor fp32 amax nearest'")
    element, block, tile, scale, rule, sigma, power, rounding, mask = m.groups()
    return QuantSpec(element, int(block) if block.isdecimal() else block, scale, rule, rounding,
                     sigma or QuantSpec.sigma, power or QuantSpec.power, mask is not None, tile is not None)
