"""How fast a device is, as ``benchmarks/calibrate.py`` measured it: the constants of the cost model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quartet.runtime.devices import Target

PASSES = ("rows", "both axes", "one axis", "requantise", "fold", "unrotate", "amax", "cast")


@dataclass(frozen=True)
class Rates:
    """Constants of one device.

    Args:
        device: what was measured.
        flops: dtype → floating-point operations a second of a large product.
        output: dtype → seconds for each element of a product's result, beside its operations.
        passes: name of ``PASSES`` → seconds an element.
        launch: seconds that any kernel takes at least.
    """

    device: str
    flops: Mapping[str, float]
    output: Mapping[str, float]
    passes: Mapping[str, float]
    launch: float

    def product(self, dtype: str, m: Any, n: Any, k: Any) -> Any:
        """Seconds of ``[m, k] · [k, n]`` of bf16 or fp8 operands into bf16."""
        return 2 * m * n * k / self.flops[dtype] + m * n * self.output[dtype] + self.launch

    def of_pass(self, name: str, elements: Any) -> Any:
        """Seconds of one pass over so many elements."""
        return elements * self.passes[name] + self.launch


MEASURED: Mapping[tuple[int, int], Rates] = {}


def rates_of(target: Target) -> Rates | None:
    """The constants for a device: those of its compute capability, or None where none were measured."""
    return None if target.capability is None else MEASURED.get(target.capability)
