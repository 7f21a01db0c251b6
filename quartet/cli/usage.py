"""What a command line may not say, told in one line and before any work. Nothing here imports PyTorch."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quartet.kernels.files import expanded
from quartet.nearest import did_you_mean
from quartet.runtime import gpus

STDOUT = Path("-")
REPORT = "report of `quartet explain --json`"
DENIED = "you may not write there"
DRAWINGS = ("png", "svg", "pdf", "jpg")
RECIPES = ("quartet", "quartet-paper", "bf16", "fp8", "fp8-rowwise", "fp8-block", "fp8-delayed", "fp8-trillion",
           "mxfp8", "nvfp4", "quartet2", "tetrajet", "tetrajet-ema", "fp4-dge", "halo-fp8-0", "halo-fp8-1",
           "halo-fp8-2", "halo-int8-0", "halo-int8-1", "halo-int8-2", "int8", "int8-all", "bitnet", "e4m3/16",
           "e4m3/16-attention", "mesa8")  # the names of quartet.recipes.built_in()


class UsageError(Exception):
    """What the user typed cannot be done; the message says what could."""


def file(text: str) -> Path:
    """A path of the command line, ``~`` a home folder also where the shell left it, as in ``--out=~/file``."""
    try:
        return expanded(text)
    except FileNotFoundError as error:
        raise UsageError(error.strerror) from None


def check_policy(text: str | None) -> None:
    """Refuse what is neither a recipe nor a file that can be read."""
    if text is None or text in RECIPES or text in ("auto", "none"):
        return
    if not text.endswith(".toml"):
        raise UsageError(f"unknown recipe {text!r}; {did_you_mean(text, RECIPES)}possible: auto, {', '.join(RECIPES)}, "
                         "or a policy in a .toml file")
    if not os.access(path := file(text), os.R_OK):
        raise UsageError(f"cannot read the policy {text}: {'you may not' if path.exists() else 'no such file'}")


def check_target(name: str | None) -> None:
    """Refuse a device that is not known."""
    try:
        if name is not None:
            gpus.target(name)
    except ValueError as error:
        raise UsageError(str(error)) from None


def check_example(target: str) -> None:
    """Refuse what is not written ``MODULE:FACTORY``."""
    module, colon, name = target.partition(":")
    if not (module and colon and name):
        raise UsageError(f"{target!r} is not MODULE:FACTORY; for example 'my_model:make'")


def check_output(path: Path | None, stdout: bool = False) -> None:
    """Refuse a file that cannot be written; ``-`` is the standard output where that may be."""
    if path is None:
        return
    if path == STDOUT:
        if not stdout:
            raise UsageError("only --json can write to the standard output; name a file")
        return
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UsageError(f"cannot write {path}: the folder {folder} does not exist; make it first")
    if path.is_dir():
        raise UsageError(f"cannot write {path}: it is a folder; name a file in it")
    reason = _unwritable(folder) if not path.exists() else None if os.access(path, os.W_OK) else DENIED
    if reason is not None:
        raise UsageError(f"cannot write {path}: {reason}; name a file in a folder of yours")


def check_folder(path: str | None) -> None:
    """Refuse a folder that cannot be made or written to."""
    if path is None:
        return
    folder = file(path).absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise UsageError(f"cannot write to {path}: {folder} is a file")
    reason = _unwritable(folder)
    if reason is not None:
        raise UsageError(f"cannot write to {path}: {reason}; name a folder of yours")


def _unwritable(folder: Path) -> str | None:
    """Why no file can be made in a folder, for root too; None if one can."""
    if not os.access(folder, os.W_OK):
        return DENIED
    try:
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"no file can be made in {folder} ({error.strerror or error})"


def check_plot(path: Path | None) -> None:
    """Refuse a drawing that matplotlib is not here for, or in a format that it does not write."""
    check_output(path)
    if path is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: run `pip install matplotlib`")
    if path.suffix[1:].lower() not in DRAWINGS:
        raise UsageError(f"cannot draw {path}: its name has to end in one of .{', .'.join(DRAWINGS)}")


def check_input(path: Path) -> None:
    """Refuse a file that cannot be read."""
    if not os.access(path, os.R_OK) or path.is_dir():
        raise UsageError(f"cannot read {path}: "
                         f"{'it is no file, or you may not' if path.exists() else 'there is no such file'}")


def read_json(path: Path, kind: str, key: str) -> Any:
    """An object of a JSON file, which has to have ``key``; ``kind`` says in words what such a file is."""
    check_input(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UsageError(f"{path} is no {kind}: {error}") from None
    if not isinstance(found, dict) or key not in found:
        raise UsageError(f"{path} is no {kind}: it has no {key!r}")
    return found


def check_positive(option: str, value: float | None) -> None:
    """Refuse a number that is not above 0 or not finite."""
    if value is not None and not 0 < value < math.inf:
        raise UsageError(f"{option} {value} is not possible; use a number above 0")


def names(option: str, text: str, legal: Sequence[str]) -> list[str]:
    """The parts of a comma-separated list, each one of ``legal``."""
    found = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in found:
        if name not in legal:
            raise UsageError(f"{option} {name!r} does not exist; {did_you_mean(name, legal)}"
                             f"possible: {', '.join(legal)}")
    return found


def shape(text: str) -> tuple[int, int, int]:
    """``M,N,K`` as numbers."""
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
        raise UsageError(f"{text!r} is not M,N,K; for example 8192,4096,4096")
    m, n, k = map(int, parts)
    return m, n, k


def archs(text: str, legal: Sequence[str]) -> list[str]:
    """Architectures to compile for, of which a GPU's name stands for its own: ``"b200"`` for ``"sm_100a"``."""
    found = []
    for name in text.split(","):
        gpu = gpus.named(name)
        found.append(name.strip() if gpu is None else f"{gpu.architecture}a")
    return names("--arch", ",".join(found), legal)
