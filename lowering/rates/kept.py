"""What ``quartet calibrate`` measured on this machine: one JSON file a model of GPU in the private cache folder.

A file is for the device's name, and the versions of PyTorch, CUDA, Triton and the driver: with others the kernels are
other ones, and it is not found. A process reads it once, so what it compiles rests on one set of numbers. The processes
of a distributed run read none, since the machines of one would not have the same; ``$QUARTET_RATES`` names a file that
all of them read, as ``quartet calibrate --out`` writes it.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from quartet.kernels.build_cache import BuildError, cache_dir, files, fingerprint, locked, notes_of, write_json
from quartet.kernels.files import expanded
from quartet.lowering.rates.constants import HOST, MEASURED, PASSES, Host, Rates
from quartet.runtime import gpus
from quartet.runtime.devices import Target

VARIABLE = "QUARTET_RATES"
PREFIX = "quartet_rates-"
AGAIN = "measure anew with `quartet calibrate`"


class RatesError(ValueError):
    """A file of rates that is none; the message says why and what to do."""


def keep(rates: Rates) -> Path:
    """Keep what was measured for later processes on this machine; the file. Raises BuildError where that cannot be."""
    path = place(rates.device, create=True)
    with locked(path):
        write_json(path, described(rates))
    forget()
    return path


def keep_once(device: str, measure: Callable[[], Rates]) -> Path:
    """Keep what ``measure`` finds of a device unless rates are kept of it; the file. Processes that start together
    measure once. Raises BuildError where nothing can be kept, before it measures."""
    path = place(device, create=True)
    with locked(path):
        if not _is_whole(path):
            write_json(path, described(measure()))
    forget()
    return path


def here(target: Target) -> Rates | None:
    """What was kept of the device of a target; None of one that is only named, and in a distributed run.

    A file that is damaged counts as none, with a warning.
    """
    return None if target.pretended or target.name is None or distributed() else _kept(target.name)


def named(target: Target) -> Rates | None:
    """The rates of the file that ``$QUARTET_RATES`` names, where they are of the target's model of GPU; of a device of
    another model that is here a warning says so once."""
    path = os.environ.get(VARIABLE)
    if not path or target.name is None:
        return None
    rates = _of_file(path)
    same = gpus.plain(rates.device) == gpus.plain(target.name)
    if same or (target.gpu is not None and gpus.named(rates.device) is target.gpu):
        return rates
    if not target.pretended:
        _warn_of_another(path, rates.device, target.name)
    return None


def refuse_file() -> None:
    """Raise RatesError where ``$QUARTET_RATES`` names a file that holds no rates."""
    if path := os.environ.get(VARIABLE):
        _of_file(path)


def unfit(target: Target) -> str | None:
    """Why ``quartet calibrate`` cannot measure a GPU, also one that is only named; None where it can."""
    if target.type != "cuda":
        return f"it measures an NVIDIA GPU, and this is {target.title}"
    if (reason := target.missing or target.foreign) is not None:
        return f"it measures an NVIDIA GPU, but {reason}"
    if target.capability is None or target.capability < (8, 0):
        return f"it measures products of bfloat16, and {target.title} has no tensor cores for it"
    return None


def distributed() -> bool:
    """Whether this process is one of several that train one model."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size() > 1
    return os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1")


def place(device: str, create: bool = False) -> Path:
    """The file of a model of GPU, there or not; ``create`` makes its folder. Raises BuildError where the cache folder
    is not private."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    parts = (device, torch.__version__, str(torch.version.cuda), triton, _driver())
    return cache_dir(create) / f"{PREFIX}{fingerprint(*(part.encode() for part in parts))}.json"


def listed() -> list[str]:
    """The devices of which something is kept, also by other versions."""
    found = (notes_of(path).get("device") for path in files(f"{PREFIX}*", "json"))
    return sorted({device if isinstance(device, str) else "damaged" for device in found})


def described(rates: Rates) -> dict[str, Any]:
    """Rates as plain data, which :func:`read` takes."""
    return {"device": rates.device, "torch": torch.__version__, "flops": dict(rates.flops),
            "output": dict(rates.output), "passes": dict(rates.passes), "launch": rates.launch,
            "host": asdict(rates.host)}


def read(content: Mapping[str, Any]) -> Rates:
    """Rates of plain data. Raises RatesError where something is missing, or no number that a rate can be."""
    try:
        flops, output, passes, host = ({str(name): _number(value) for name, value in content[key].items()}
                                       for key in ("flops", "output", "passes", "host"))
        launch, device = _number(content["launch"]), content["device"]
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise RatesError(f"{type(error).__name__}: {error}") from error
    host = {"call": HOST.call, "begun": HOST.begun} | host  # which had two numbers once
    names = {"output": (output, flops), "passes": (passes, PASSES), "host": (host, asdict(Host()))}
    if not isinstance(device, str) or "bf16" not in flops or any(set(a) != set(b) for a, b in names.values()):
        raise RatesError("it has other names in it than rates have")
    others = (*output.values(), *passes.values(), *host.values(), launch)
    if not all(math.isfinite(value) and value > 0 for value in flops.values()) or not all(
            math.isfinite(value) and value >= 0 for value in others):
        raise RatesError("not all of it are numbers that rates can be")
    return Rates(device, flops, output, passes, launch, Host(**host), MEASURED)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r:.40} is no number")
    return float(value)


def _parsed(text: str | bytes) -> Rates:
    """Rates of JSON. Raises RatesError, or another ValueError where it is none."""
    try:
        return read(json.loads(text))
    except RecursionError as error:
        raise RatesError("it is nested too deeply") from error


def _is_whole(path: Path) -> bool:
    try:
        _parsed(path.read_bytes())
    except (OSError, ValueError):
        return False
    return True


def forget() -> None:
    """Read files again when they are next needed."""
    _kept.cache_clear()
    _of_file.cache_clear()
    _warn_of_another.cache_clear()


@cache
def _kept(device: str) -> Rates | None:
    try:
        path = place(device)
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except (BuildError, OSError) as error:
        warnings.warn(f"quartet: the rates that may be kept of {device} cannot be read: {error}", stacklevel=2)
        return None
    try:
        found = _parsed(content)
    except ValueError as error:
        warnings.warn(f"quartet: the rates kept in {path} are damaged ({error}) and do not count: {AGAIN}",
                      stacklevel=2)
        return None
    return found if found.device == device else None


@cache
def _of_file(path: str) -> Rates:
    try:
        file = expanded(path)
    except FileNotFoundError as error:
        raise RatesError(f"environment variable {VARIABLE}: {error.strerror}") from error
    try:
        return _parsed(file.read_bytes())
    except (OSError, ValueError) as error:
        raise RatesError(f"environment variable {VARIABLE}: {path} holds no rates ({error}); write it with `quartet "
                         f"calibrate --out {path}`, or unset the variable") from error


@cache
def _warn_of_another(path: str, measured: str, device: str) -> None:
    warnings.warn(f"quartet: environment variable {VARIABLE}: {path} has the rates of {measured}, which do not count "
                  f"for {device}; `quartet calibrate --out FILE` measures that", stacklevel=2)


def _driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return ""
