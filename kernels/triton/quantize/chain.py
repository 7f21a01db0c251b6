"""A chain of the quantisers: hadamard → quantize of one operand, what its kernels are compiled for, what they take."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from quartet.kernels.reference.hadamard import SIZES
from quartet.kernels.spec import QuantSpec, chain_multiple, dtype_name
from quartet.kernels.triton.host import DTYPES, cdiv


@dataclass(frozen=True)
class Chain:
    """hadamard → quantize of one operand.

    Args:
        spec: the quantiser. rotation: Hadamard size, or 0 for none. signs: float32 ``[rotation]``, or None.
        seed: int64 scalar tensor, needed when ``spec.stochastic``. site: 0…2^32−1.
        encode: float32 with one element, the tensor's multiplier of ``reference.nvfp4.tensor_scales``, needed with e4m3
            scales.
    """

    spec: QuantSpec
    rotation: int = 0
    signs: Tensor | None = None
    seed: Tensor | None = None
    site: int = 0
    encode: Tensor | None = None

    @property
    def multiple(self) -> int:
        """What the quantised axis is padded to a multiple of: what a Hadamard or a scale spans."""
        return chain_multiple(self.spec, self.rotation)

    def unit(self, width: int) -> int:
        """Elements that one thread owns of an axis ``width`` long."""
        if self.spec.rule == "eden":
            return 32
        n = self.multiple
        return 32 if n < 32 and cdiv(width, n) * n % 32 == 0 else n

    def units(self, width: int) -> int:
        """How many of them there are, padding included."""
        return cdiv(width, self.multiple) * self.multiple // self.unit(width)

    def constants(self, unit: int, form: Form, masked: bool = True) -> ChainConstants:
        """What the kernels are compiled for; not ``masked``: they leave out the mask that the spec asks for."""
        return _constants(self.spec, unit, self.rotation, form, masked)


@dataclass(frozen=True)
class Form:
    """How the quantisers write scales and round.

    Args:
        swizzled: scales are ``[swizzled_size(R, Kp/block)]`` in the layout of ``reference.swizzle_scales``, padding 0.
        conversions: the roundings, of ``spec.ROUNDINGS``, that are left to the GPU's conversion instructions; to
            nearest their codes are the same, stochastic ones only have the same expectation.
    """

    swizzled: bool = False
    conversions: tuple[str, ...] = ()


PLAIN = Form()


@dataclass(frozen=True)
class ChainConstants:
    """One constexpr argument of a kernel, which reads what it needs of it; Triton's keys hold its ``repr`` and hash.

    Args:
        spec: the quantiser. unit: elements that one thread owns. rotation: Hadamard size, or 0 for none.
        swizzled: see :class:`Form`. hardware: the GPU's conversions do the rounding.
    """

    spec: QuantSpec
    unit: int
    rotation: int
    swizzled: bool
    hardware: bool


@cache
def _constants(spec: QuantSpec, unit: int, rotation: int, form: Form, masked: bool) -> ChainConstants:
    rounding = "nearest" if spec.rule == "eden" else spec.rounding  # of the codes; eden's scales round stochastically
    return ChainConstants(spec if masked else replace(spec, mask=False), unit, rotation, form.swizzled,
                          rounding in form.conversions)


@cache
def supports(spec: QuantSpec, rotation: int, dtype: torch.dtype) -> str | None:
    """None when the kernels compute ``spec`` after a Hadamard of size ``rotation`` (0: none) on ``dtype``, else why."""
    if spec.element != "e2m1" or spec.scale == "fp32":
        return f"the Triton quantisers write e2m1 with e8m0 or e4m3 scales, not {spec.element} with {spec.scale}"
    if spec.scale == "e8m0" and spec.block not in (32, 64, 128):
        return f"the Triton quantisers take blocks of 32, 64 and 128, not {spec.block}"
    if 0 < rotation < spec.block:
        return f"the Triton quantisers rotate whole blocks: a Hadamard of {rotation} is shorter than {spec.block}"
    if rotation and spec.tile:
        return f"the Triton quantisers do not rotate what has tiles, as '{spec}'"
    if rotation != 0 and rotation not in SIZES:
        return f"Hadamard size {rotation} is not possible; use 0 (none) or one of {SIZES}"
    if dtype not in DTYPES:
        return f"the Triton quantisers read and write float32, bfloat16 and float16, not {dtype_name(dtype)}"
    return None
