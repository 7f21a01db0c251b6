"""Which configuration computes a product: one named by the user, the fastest that was measured, or the rule's.

Measurements lie in the cache folder, ``cutlass_tuned-HASH.json``, a file for each kind of device, driver and state of
the kernels' source, and serve every process that uses the folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

from quartet.kernels.build_cache import BuildError, cache_dir, files, fingerprint, locked, notes_of, write_json
from quartet.kernels.cutlass.build import source_of
from quartet.kernels.cutlass.configuration import Configuration, ConfigurationError, choose, every_tile, table

VARIABLE = "QUARTET_CUTLASS_TILES"
PREFIX = "cutlass_tuned-"
SMALLEST_TILE = 128


@dataclass(frozen=True)
class Product:
    """``[m, k] × [n, k] → [m, n]`` on an architecture: what decides which configuration computes it."""

    arch: str
    kind: str
    output: str
    bias: bool
    accumulate: bool
    m: int
    n: int
    k: int

    def configurations(self) -> tuple[Configuration, ...]:
        """All of the table that compute it."""
        return tuple(table([self.arch], [self.kind], self.output, self.bias, self.accumulate))

    @property
    def shape_class(self) -> str:
        """What products share a measurement, such as ``mxf4 bf16 8192x4096x4096``: each extent is rounded up to three
        binary digits, and to whole tiles."""
        epilogue = " + bias" * self.bias + " + C" * self.accumulate
        return f"{self.kind} {self.output}{epilogue} {'x'.join(map(str, map(_rounded, (self.m, self.n, self.k))))}"


def select(product: Product, device: torch.device, multiprocessors: int) -> Configuration:
    """The configuration for a product: the first that ``$QUARTET_CUTLASS_TILES`` names (``256x128x256_2x1_2sm,…``, as
    in the kernels' names), else the fastest measured, else that of ``choose``.

    Raises:
        ConfigurationError: a tile that no kernel has, or :func:`supports` declines.
    """
    return _select(product, device, multiprocessors, os.environ.get(VARIABLE, ""))


def is_settled(product: Product, device: torch.device) -> bool:
    """Whether a product's configuration is named or measured, and not the rule's."""
    return _is_settled(product, device, os.environ.get(VARIABLE, ""))


def remember(product: Product, device: torch.device, microseconds: Mapping[Configuration, float],
             replace: bool = True) -> None:
    """Keep what was measured for a product's shape class; without ``replace`` only where nothing was.

    Raises BuildError when others can write to the cache folder, or this user cannot.
    """
    path = measurements(product.arch, device)
    with locked(path):
        products = _read(path)
        if replace or product.shape_class not in products:
            products[product.shape_class] = {c.name: round(time, 2) for c, time in microseconds.items()}
            write_json(path, {"device": _name(device), "driver": driver(), "microseconds": products})
    forget()


def forget() -> None:
    """Read measurements again when they are next needed."""
    for cached in (_select, _is_settled, _measured):
        cached.cache_clear()


def measurements(arch: str, device: torch.device) -> Path:
    """The file of a device's measurements, there or not."""
    state = (_name(device), driver(), *(source_of(configuration) for configuration in table([arch])))
    return cache_dir() / f"{PREFIX}{fingerprint(*(text.encode() for text in state))}.json"


def measured_classes() -> Iterator[tuple[str, list[str]]]:
    """(name of a device, its shape classes that were measured), of every file in the cache folder."""
    for path in files(f"{PREFIX}*", "json"):
        yield str(notes_of(path).get("device")), sorted(_read(path))


@cache
def driver(version: Path = Path("/proc/driver/nvidia/version")) -> str:
    """What the NVIDIA driver calls itself; empty where it says nothing."""
    try:
        return version.read_text().splitlines()[0]
    except (OSError, IndexError):
        return ""


@lru_cache(maxsize=4096)
def _select(product: Product, device: torch.device, multiprocessors: int, tiles: str) -> Configuration:
    return _named(product, tiles) or _fastest(product, device) or choose(
        product.arch, product.kind, product.m, product.n, product.k, output=product.output, bias=product.bias,
        accumulate=product.accumulate, multiprocessors=multiprocessors)


@lru_cache(maxsize=4096)
def _is_settled(product: Product, device: torch.device, tiles: str) -> bool:
    return _named(product, tiles) is not None or _fastest(product, device) is not None


def _named(product: Product, tiles: str) -> Configuration | None:
    names = [name.strip() for name in tiles.split(",") if name.strip()]
    known = every_tile()
    for name in names:
        if name not in known:
            raise ConfigurationError(f"{VARIABLE}: no kernel has the tile {name!r}; possible: {', '.join(known)}")
    ours = {configuration.tile_name: configuration for configuration in product.configurations()}
    return next((ours[name] for name in names if name in ours), None)


def _fastest(product: Product, device: torch.device) -> Configuration | None:
    times = _measured(product.arch, device).get(product.shape_class)
    ours = {configuration.name: configuration for configuration in product.configurations()}
    known = {name: time for name, time in times.items() if name in ours} if isinstance(times, dict) else {}
    return ours[min(known, key=lambda name: known[name])] if known else None


@cache
def _measured(arch: str, device: torch.device) -> Mapping[str, Any]:
    try:
        return _read(measurements(arch, device))
    except BuildError:  # of the folder; whoever opens a kernel is told
        return {}


def _read(path: Path) -> dict[str, Any]:
    found = notes_of(path).get("microseconds")
    return dict(found) if isinstance(found, dict) else {}


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def _rounded(extent: int) -> int:
    step = max(SMALLEST_TILE, 1 << max(0, extent.bit_length() - 3))
    return -(-extent // step) * step
