"""How fast a device is: the constants of the cost model (``constants``), and where they come from.

In this order: the file that ``$QUARTET_RATES`` names, what ``quartet calibrate`` has kept on this machine (``kept``),
what was measured before (``shipped``), what follows from a data sheet or from the device's properties (``datasheet``).
"""

from __future__ import annotations

from dataclasses import replace

from quartet.lowering.rates import datasheet, kept, shipped
from quartet.lowering.rates.constants import HOST, PASSES, Host, Rates, Time
from quartet.runtime.devices import Target

__all__ = ["HOST", "PASSES", "Host", "Rates", "Time", "rates_of"]


def rates_of(target: Target) -> Rates | None:
    """The constants for a device; None where nothing is known of it, as of a CPU.

    They are the same in every process of a distributed run on equal GPUs: what one machine has kept does not count
    there. Raises RatesError where ``$QUARTET_RATES`` names a file that is none.
    """
    gpu = target.gpu
    if gpu is None and target.name is None:
        return None
    found = kept.named(target) or kept.here(target)
    if found is not None:
        return replace(found, portable=shipped.RATES["h200"].portable) if target.capability == (9, 0) else found
    if gpu is None:
        return None
    return shipped.RATES.get(gpu.name) or datasheet.rates(gpu)
