"""Templates of the pages: self-contained, nothing is fetched when they are looked at, all that a model names is
escaped."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

FOLDER = Path(__file__).parent


@cache
def _environment() -> Environment:
    made = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                       lstrip_blocks=True)
    made.globals.update({name.replace(".", "_"): Markup((FOLDER / name).read_text(encoding="utf-8"))
                         for name in ("style.css", "page.js")})
    return made


def render(name: str, **data: Any) -> str:
    """A template with its data; what is not a ``Markup`` is escaped. Raises where data are missing."""
    return _environment().get_template(name).render(**data)
