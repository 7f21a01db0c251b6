"""Where results go: places that are checked before the work, and files that are there whole or not at all."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

INSTALL = "pip install -e '.[demo]'"


def needs(package: str, error: ImportError) -> str:
    """What to do about a package that a program cannot do without."""
    return f"this program needs {package} ({error}): run `pip install {package}`, or `{INSTALL}` for all of them"


def require(package: str) -> None:
    """End the program, in words, where a package is missing."""
    try:
        import_module(package)
    except ImportError as error:
        raise SystemExit(needs(package, error)) from None


def as_path(text: str) -> Path:
    """A path of the command line, ``~`` a home folder also where the shell left it, as in ``--out=~/run``."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None


def check_folder(folder: Path, option: str) -> None:
    """Make a folder if need be; end the program where nothing can be written there. ``option`` names another."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise SystemExit(f"cannot write to the folder {folder}: {error.strerror or error}; name another with "
                         f"{option}") from None


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to, which takes its place at the end; a link there is replaced, not followed."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    partial = Path(name)
    try:
        os.fchmod(descriptor, 0o644)
        os.close(descriptor)
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    write_text(path, json.dumps(data, indent=1))
