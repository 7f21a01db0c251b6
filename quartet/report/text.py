"""Numbers and names as a report writes them."""

from __future__ import annotations

import re

INDEX = re.compile(r"(?<![^.])\d+(?![^.])")  # the numbers in a module's name


def shorten(text: str, width: int) -> str:
    """``text`` with its middle replaced by ``…`` so that it fits ``width`` characters."""
    if len(text) <= width:
        return text
    tail = (width - 1 + 1) // 2
    head = width - 1 - tail
    return text[:head] + "…" + text[len(text) - tail:]


def human_bytes(count: int | None) -> str:
    """``"1.5 MiB"``; ``"–"`` for None."""
    if count is None:
        return "–"
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def percent(share: float | None) -> str:
    """``"62.5 %"``; ``"–"`` for None."""
    return "–" if share is None else f"{100 * share:.1f} %"
