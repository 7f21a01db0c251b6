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
        flops: dtype → floating-point operations a second of a large product, under a load that lasts: power then limits
            the clock, as in training.
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


MEASURED: Mapping[tuple[int, int], Rates] = {
    (9, 0): Rates(
        "NVIDIA H200",
        flops={"bf16": 6.78e14, "fp8": 1.345e15},  # under sustained load; 8.26e14 and 1.63e15 in bursts
        output={"bf16": 2.6e-13, "fp8": 2.27e-13},
        passes={"rows": 1.1e-12, "both axes": 1.97e-12, "one axis": 1.34e-12, "requantise": 1.1e-12, "fold": 3.8e-13,
                "unrotate": 9.96e-13, "amax": 8.06e-13, "cast": 9.58e-13},
        launch=5.4e-6),
}


def rates_of(target: Target) -> Rates | None:
    """The constants for a device: those of its compute capability, or None where none were measured."""
    return None if target.capability is None else MEASURED.get(target.capability)
