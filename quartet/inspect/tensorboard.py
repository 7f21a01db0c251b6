"""Statistics for TensorBoard: a scalar for each column of each record, a histogram of an operand's scales."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import Any

import torch

from quartet.inspect.records import Record
from quartet.kernels.files import expanded

_MOST = 4096  # scales of a histogram; more are drawn as so many in the same proportions


def write(records: Iterable[Record], writer: Any) -> None:
    """Add all records to a ``SummaryWriter``, or to one of a folder, which needs the package tensorboard.

    Raises:
        ImportError: a folder, and no tensorboard.
    """
    made = not hasattr(writer, "add_scalar")
    if made:
        from torch.utils.tensorboard import SummaryWriter

        folder = os.fspath(writer)  # or an address, such as gs://…
        writer = SummaryWriter(expanded(folder) if folder.startswith("~") else folder)
    for record in records:
        tag = f"{record.kind}/{record.name.replace(' ', '/')}"
        for column, value in record.values.items():
            if not math.isnan(value):
                writer.add_scalar(f"{tag}/{column}", value, record.step)
        if record.scales:
            writer.add_histogram(f"{tag}/log2 of scales", _spread(record), record.step)
    writer.flush()
    if made:
        writer.close()


def _spread(record: Record) -> torch.Tensor:
    """The exponents of the scales, each as often as it occurs."""
    less = max(1.0, sum(record.scales.values()) / _MOST)
    exponents = torch.tensor(list(record.scales), dtype=torch.float64, device="cpu")
    counts = [math.ceil(n / less) for n in record.scales.values()]
    return exponents.repeat_interleave(torch.tensor(counts, dtype=torch.int64, device="cpu"))
