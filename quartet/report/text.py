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
    """``"62.5 %"``; ``"–"`` for None. Only nothing is ``"0.0 %"``, and only all of it ``"100.0 %"``."""
    if share is None:
        return "–"
    shown = f"{100 * share:.1f} %"
    if shown == "0.0 %" and share > 0:
        return "<0.1 %"
    return ">99.9 %" if shown == "100.0 %" and share < 1 else shown
