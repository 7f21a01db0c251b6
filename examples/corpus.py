"""Real text that every Python has: the sources of its own standard library, and of what is installed, as bytes."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
VALIDATION_PERCENT = 10
MOST_BYTES = 256 << 10


@dataclass(frozen=True)
class Corpus:
    """Two flat uint8 tensors and where they came from."""

    train: Tensor
    validation: Tensor
    source: str

    def batch(self, split: str, seed: int, step: int, batch: int, length: int) -> tuple[Tensor, Tensor]:
        """Tokens and next tokens, int64 [batch, length]: a pure function of the arguments.

        Raises:
            ValueError: the split is shorter than ``length + 1`` bytes.
        """
        data = {"train": self.train, "validation": self.validation}[split]
        if len(data) <= length:
            raise ValueError(
                f"the {split} split of {self.source} has {len(data)} bytes, a sequence of {length} needs "
                f"{length + 1}; use --seq {max(len(data) - 1, 1)} or less, or more text"
            )
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(len(data) - length, (batch, 1), generator=generator)
        windows = data[starts + torch.arange(length + 1)].long()
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def read_corpus(file: Path | None = None) -> Corpus:
    """The standard library's ``.py`` files, or one file of any kind.

    The library is split by file: those whose path hashes into the last tenth are for validation, so no
    validation text is the middle of a training file. A single file is cut at nine tenths.
    """
    if file is not None:
        data = file.read_bytes()
        cut = len(data) * (100 - VALIDATION_PERCENT) // 100
        return Corpus(_tensor(data[:cut]), _tensor(data[cut:]), str(file))
    root = Path(sysconfig.get_path("stdlib"))
    train, validation = bytearray(), bytearray()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts):
            held_out = _percentile(relative.as_posix()) >= 100 - VALIDATION_PERCENT
            (validation if held_out else train).extend(path.read_bytes())
    return Corpus(_tensor(train), _tensor(validation), f"the Python sources under {root}")


def read_packages(train_bytes: int, validation_bytes: int) -> Corpus:
    """The ``.py`` files of the standard library and of the installed packages, until both splits are full.

    Files come in the order of their path's hash and fall into the splits as in ``read_corpus``. A file that is there
    twice counts once, one of more than 256 KiB (tables, mostly) not at all.

    Args:
        train_bytes, validation_bytes: sizes of the splits; smaller where less is installed.
    """
    splits, wanted = (bytearray(), bytearray()), (train_bytes, validation_bytes)
    seen: set[bytes] = set()
    for name, path in sorted(_installed(), key=lambda file: hashlib.sha256(file[0].encode()).digest()):
        held_out = int(_percentile(name) >= 100 - VALIDATION_PERCENT)
        if len(splits[held_out]) >= wanted[held_out]:
            continue
        try:
            text = path.read_bytes() if path.stat().st_size <= MOST_BYTES else b""
        except OSError:
            continue
        digest = hashlib.sha256(text).digest()
        if digest not in seen:
            seen.add(digest)
            splits[held_out].extend(text)
    train, validation = (_tensor(split[:size]) for split, size in zip(splits, wanted, strict=True))
    return Corpus(train, validation, "the Python sources installed here")


def _installed() -> Iterator[tuple[str, Path]]:
    """(path below its root, path) of every ``.py`` file of the library and the packages."""
    library = sysconfig.get_path("stdlib")
    for root in sorted({library, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}):
        for folder, folders, files in os.walk(root):
            folders[:] = sorted(name for name in folders if name not in ("site-packages", "dist-packages"))
            for file in sorted(files):
                if file.endswith(".py"):
                    path = Path(folder, file)
                    yield path.relative_to(root).as_posix(), path


def _percentile(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100


def _tensor(data: bytes | bytearray) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
