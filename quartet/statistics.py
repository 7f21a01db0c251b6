"""Numbers that the kernels count while they run."""

from __future__ import annotations

import sys


def statistics() -> dict[str, dict[str, int]]:
    """What happened on each GPU since the process started, by device name; waits for the devices.

    Returns:
        ``{"cuda:0": {"inexact_fold_blocks": n}}``: n blocks of 32 MXFP4 values lay so far below the largest of their
        row, by more than fourteen powers of two, that E4M3 with a scale a row could not hold all of them exactly.
        Devices that have not run such a kernel are not there.
    """
    fold = sys.modules.get("quartet.kernels.triton.quantize.fold")
    counters = fold.COUNTERS if fold is not None else {}
    return {str(device): {"inexact_fold_blocks": int(counter)} for device, counter in counters.items()}
