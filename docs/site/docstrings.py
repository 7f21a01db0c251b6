"""How the site reads docstrings of this package, in which a section needs no empty line before it, and a role of Sphinx
marks a name."""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTION = re.compile(r"(?<=\S)\n(?=(?:Args|Attributes|Returns|Yields|Raises):\n)")
ROLE = re.compile(r":(?:attr|class|func|meth|mod):`~?(?:[\w.]*\.)?(\w+)`")


class House(griffe.Extension):
    """Makes them Google's, in Markdown."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = SECTION.sub("\n\n", ROLE.sub(r"`\1`", obj.docstring.value))
