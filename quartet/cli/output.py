"""What commands print and write."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quartet.cli.usage import REPORT, STDOUT, UsageError
from quartet.lowering.rates.kept import RatesError, refuse_file
from quartet.options import OptionError, Options
from quartet.recipes import PolicyError
from quartet.report.table import WIDTH, Report


def show(text: str, data: Any, path: Path | None) -> None:
    """Print a text and write the same as data; where that goes to the standard output, it alone."""
    if path != STDOUT:
        print(text)
    if path is not None:
        made = json.dumps(data, indent=1) + "\n"
        if path == STDOUT:
            print(made, end="")
        else:
            write(path, made)


def write(path: Path, text: str) -> None:
    """Write a file; raises UsageError where that fails."""
    from quartet.kernels.files import write_text

    try:
        write_text(path, text)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from None


def terminal_width() -> int:
    """Columns of the terminal; where the output is none, those of a report."""
    return min(WIDTH, shutil.get_terminal_size().columns) if sys.stdout.isatty() else WIDTH


def refused(options: Mapping[str, Any]) -> None:
    """Raise UsageError for options, or rates that the environment names, that cannot be."""
    try:
        Options.parse(options=options)
        refuse_file()
    except (OptionError, PolicyError, RatesError) as error:
        raise UsageError(str(error)) from None


def report_of(data: Any, path: Path) -> Report:
    """A report from what ``quartet explain --json`` wrote to a file."""
    try:
        return Report.from_dict(data)
    except (ValueError, TypeError, KeyError) as error:
        said = f"it has no {error}" if isinstance(error, KeyError) else error
        raise UsageError(f"{path} is no {REPORT}: {said}") from None


def read_tensors(path: Path) -> Any:
    """What torch.save wrote, on the CPU wherever it was; raises UsageError for anything else than tensors in lists and
    dicts."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of any kind: the unpickler follows whatever bytes are there
        said = next(iter(str(error).splitlines()), "")
        if not said or "weights_only" in said:  # advice to run whatever code the file holds
            said = "it holds something else, or is cut off"
        raise UsageError(f"cannot read {path} as tensors that torch.save wrote: {type(error).__name__}: "
                         f"{said}") from None
