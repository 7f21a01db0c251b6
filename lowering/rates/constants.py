"""The constants of the cost model: how fast a device is at what surrounds a quantised product, and its host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PASSES = ("rows", "both axes", "one axis", "requantise", "fold", "unrotate", "amax", "cast", "copy")
GROUPED: Mapping[str, float] = {"bf16": 1.0, "fp8": 0.83}
"""Operations a second of products of groups, of those of one product: 7.8 and 4.7 ms of 16384 × 4096 × 14336 in 8
groups, forward and backward, on an H200."""
NEIGHBOURS = 2
"""Kernels that Inductor launches beside each product, in the model's dtype too: 1031 of a Llama of 336 products."""


@dataclass(frozen=True)
class Time:
    """What a kernel takes, or several do: seconds of the device, and launches."""

    device: Any
    launches: Any = 1

    def __add__(self, other: Any) -> Time:
        more = other if isinstance(other, Time) else Time(other, 0)
        return Time(self.device + more.device, self.launches + more.launches)

    def __mul__(self, times: Any) -> Time:
        return Time(times * self.device, times * self.launches)

    __radd__, __rmul__ = __add__, __mul__


@dataclass(frozen=True)
class Host:
    """Seconds that the host takes to launch one kernel: of ours, and one that Inductor generates or PyTorch has; to
    call a graph and its backward, and what is added where it has launches of ours, whose first of each kind meets cold
    caches.

    With 0 the host is never what limits: CUDA graphs.
    """

    ours: float = 0.0
    plain: float = 0.0
    call: float = 0.0
    begun: float = 0.0


# on an H200: bench_launch.py, compiled; aten.neg; bench_linear.py, steps of one layer in a loop, the slowest host seen
HOST = Host(ours=13.2e-6, plain=10.6e-6, call=0.75e-3, begun=0.45e-3)


@dataclass(frozen=True)
class Origin:
    """Where constants come from.

    Args:
        text: for the user, with ``{}`` for the device.
        margin: by which share less a layer has to take to be worth it, for what they may be wrong by.
        measured: whether a GPU of this model was.
    """

    text: str
    margin: float
    measured: bool


MEASURED = Origin("rates measured on {}", 0.02, True)  # two runs of a measurement differ by as much
SHIPPED = Origin("rates shipped for {}", 0.02, True)
DATA_SHEET = Origin("the data sheet of {}", 0.1, False)
ESTIMATE = Origin("an estimate for {}", 0.2, False)


@dataclass(frozen=True)
class Rates:
    """Constants of one device.

    Args:
        device: what they are of.
        flops: dtype → operations a second of a large product, under a load that lasts: power then limits the clock, as
            in training. A dtype that is missing has none.
        output: dtype → seconds for each element of a product's result, beside its operations.
        passes: name of ``PASSES`` → seconds an element.
        launch: seconds that any kernel takes at least.
        host: seconds to launch one. origin: where they come from.
        portable: passes that the GPU has kernels of its own for → how many times as long the Triton kernels take, which
            run where those decline a recipe. It follows from the GPU: what differs in nothing else is equal.
    """

    device: str
    flops: Mapping[str, float]
    output: Mapping[str, float]
    passes: Mapping[str, float]
    launch: float
    host: Host = Host()
    origin: Origin = MEASURED
    portable: Mapping[str, float] = field(default_factory=dict, compare=False)

    @property
    def source(self) -> str:
        """Where they come from, for the user."""
        return self.origin.text.format(self.device)

    def product(self, dtype: str, m: Any, n: Any, k: Any) -> Any:
        """:class:`Time` of ``[m, k] · [k, n]`` of such operands; None where there are no rates for them."""
        return self.products(dtype, 2 * m * n * k, m * n)

    def products(self, dtype: str, operations: Any, results: Any, grouped: bool = False) -> Any:
        """:class:`Time` of one launch with so many operations and elements of results; None without rates."""
        if dtype not in self.flops or (grouped and dtype not in GROUPED):
            return None
        flops = self.flops[dtype] * (GROUPED[dtype] if grouped else 1.0)
        return Time(operations / flops + results * self.output[dtype] + self.launch)

    def of_pass(self, name: str, elements: Any, launches: float = 1.0) -> Any:
        """:class:`Time` of one pass over so many elements."""
        return Time(elements * self.passes[name] + self.launch, launches)
