"""How fast a device is: the constants of the cost model (``constants``), and where they come from.

In this order: what was measured before (``shipped``), what follows from a data sheet or from the device's properties
(``datasheet``).
"""

from __future__ import annotations

from quartet.lowering.rates import datasheet, shipped
from quartet.lowering.rates.constants import HOST, PASSES, Host, Rates, Time
from quartet.runtime.devices import Target

__all__ = ["HOST", "PASSES", "Host", "Rates", "Time", "rates_of"]


def rates_of(target: Target) -> Rates | None:
    """The constants for a device; None where nothing is known of it, as of a CPU."""
    gpu = target.gpu
    if gpu is None:
        return None
    return shipped.RATES.get(gpu.name) or datasheet.rates(gpu)
