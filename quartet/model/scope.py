"""The code that dynamo is compiling: its variables, and the expressions by which it reaches them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quartet.runtime.compat import dynamo_output


@dataclass(frozen=True)
class Scope:
    """The code that dynamo is compiling on this thread: its variables, whether it goes on after a graph break, and
    whether the graph at hand ends in one."""

    local: Mapping[str, Any]
    outside: Mapping[str, Any]
    resumed: bool
    broken: bool

    def value(self, source: Any) -> Any:
        """What a source of dynamo stands for; None for one that no expression over the variables gives."""
        try:
            return eval(source_name(source), {"L": self.local, "G": self.outside})
        except Exception:  # an expression of dynamo's own guards may need more than the variables
            return None


def compiling() -> Scope | None:
    """The code whose graph a backend has been given; None outside of a compilation by dynamo."""
    try:
        output = dynamo_output()
        root, reason = output.root_tx, output.compile_subgraph_reason
        return Scope(root.f_locals, root.f_globals, root.f_code.co_name.startswith("torch_dynamo_resume"),
                     bool(getattr(reason, "graph_break", False)))
    except (ImportError, AttributeError):
        return None


def source_name(source: Any) -> str:
    """The expression that dynamo writes for where a value comes from."""
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def source_bases(source: Any) -> list[Any]:
    """A source and those that it starts from, the first variable first: of ``L['self'].net.weight`` those of ``self``,
    ``self.net`` and so on."""
    found: list[Any] = []
    while source is not None:
        found.insert(0, source)
        source = getattr(source, "base", None)
    return found
