"""With ``$QUARTET_CALIBRATE=1`` the first compilation on a GPU of which no rates were measured measures and keeps them.

Not in a distributed run, where kept rates do not count, nor while a CUDA graph is recorded, nor where nothing can be
kept: what is measured has to decide the next run too. Where measuring fails, one warning says so and the tables decide.
"""

from __future__ import annotations

import logging
import os

import torch

from quartet.lowering.rates import kept, rates_of
from quartet.lowering.rates.constants import MEASURED
from quartet.options import OptionError
from quartet.runtime.devices import Target

VARIABLE = "QUARTET_CALIBRATE"
_failed: set[str] = set()  # devices that this process could not measure, or of which it could keep nothing
log = logging.getLogger("quartet")


def calibrate_once(device: torch.device) -> None:
    """Measure a device if the environment asks for it and it has no measured rates; says in the log what it did.

    Raises OptionError where the environment says neither 0 nor 1.
    """
    asked = os.environ.get(VARIABLE, "")
    if asked not in ("", "0", "1"):
        raise OptionError(f"environment variable {VARIABLE} is {asked!r}; possible: 1, or 0 as without it")
    if asked != "1" or device.type != "cuda" or kept.distributed():
        return
    target = Target.of(device)
    if kept.unfit(target) is not None or target.name in _failed or torch.cuda.is_current_stream_capturing():
        return
    known = rates_of(target)
    if known is not None and known.origin is MEASURED:
        return
    from quartet.lowering.rates.measure import measure

    try:
        path = kept.keep_once(str(target.name), lambda: measure(device))
    except Exception as error:  # of compilers, drivers and kernels: the user's model is not what fails
        _failed.add(str(target.name))
        log.warning(f"{VARIABLE}=1: the rates of {target.title} were not measured, and its tables decide: "
                    f"{type(error).__name__}: {error}")
        return
    log.warning(f"{VARIABLE}=1: what pays on {target.title} is decided from now on by the rates kept in {path}, in "
                "runs of one process")
