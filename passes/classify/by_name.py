"""What a linear layer is by its name alone, where no graph shows what becomes of its result."""

from __future__ import annotations

from fnmatch import fnmatch

from quartet.runtime.direct.convert import HEADS, ROUTERS

_CLASSES = {"lm_head": HEADS, "router": ROUTERS}


def class_by_name(module: str) -> str:
    """``"lm_head"``, ``"router"`` or ``"linear"`` of a module's name."""
    return next((op_class for op_class, names in _CLASSES.items() if any(fnmatch(module, name) for name in names)),
                "linear")
