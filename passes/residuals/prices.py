"""What a choice about a kept tensor costs in time, in whole femtoseconds.

    encoded           one pass over its elements, one more for random bits, and one in backward where a kernel reads it
                      that cannot decode
    a weight again    half a cast of it: it is read once more, and its codes are written as often
    a product again   what its layer takes with it computed again, less what it takes with its result kept

Where the device has no rates, or a kernel no price, they are those of a nominal GPU: to pass over an element takes
1 ps, as long as 650 operations of a product. They are good for an order only then.
"""

from __future__ import annotations

from dataclasses import dataclass

from quartet.lowering.cost import Layer, predict
from quartet.lowering.rates import Rates, rates_of
from quartet.passes.sites import Quantized
from quartet.runtime.devices import Target
from quartet.runtime.sizes import hint

FEMTO = 1e15
_ELEMENT, _OPERATIONS = 1e-12, 650e12  # seconds an element, operations a second of the nominal GPU


@dataclass(frozen=True)
class Prices:
    """The prices of one device; ``rates`` is None where none are known."""

    rates: Rates | None

    @classmethod
    def of(cls, target: Target) -> Prices:
        return cls(rates_of(target))

    def seconds(self, time: int) -> float | None:
        """A time in seconds; None where no rates are known."""
        return None if self.rates is None else time / FEMTO

    def passes(self, elements: int, times: float = 1) -> int:
        """Passes over so many elements each."""
        if self.rates is None:
            return round(times * elements * _ELEMENT * FEMTO)
        return round(times * (elements * self.rates.passes["cast"] + self.rates.launch) * FEMTO)

    def requantised(self, elements: int) -> int:
        """A weight quantised in backward once more, for codes that forward then need not write."""
        return self.passes(elements, 0.5)

    def again(self, site: Quantized) -> int:
        """The forward product of a site in backward once more."""
        m, n, k = map(hint, site.dims("fprop"))
        both = [self._layer(site, m, n, k, again) for again in (True, False)]
        if None not in both:
            return round((both[0] - both[1]) * FEMTO)  # type: ignore[operator]
        rate = _OPERATIONS if self.rates is None else self.rates.flops["bf16"]
        return round(2 * m * n * k / rate * FEMTO)

    def _layer(self, site: Quantized, m: int, n: int, k: int, again: bool) -> float | None:
        """Seconds of the device for the forward product and its passes; None where they are not known."""
        if self.rates is None:
            return None
        layer = Layer({"fprop": site.decisions["fprop"].kernel}, m, n, k, recompute=again)
        cost = predict(site.recipe, layer, self.rates)
        return None if cost is None else float(cost.quantized)
