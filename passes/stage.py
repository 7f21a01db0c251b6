"""What a pass of a user's own is given: the graph as the passes before it have left it, and what they know of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch.fx import Graph, Node

from quartet.kernels.extension import ExtensionError
from quartet.lowering.ir.graph import Builder, editing, is_backward
from quartet.passes.graph_pass import GraphPass
from quartet.passes.sites import Found
from quartet.passes.state import Phase, State


class Stage:
    """One graph between two passes."""

    def __init__(self, state: State) -> None:
        self._state = state

    @property
    def graph(self) -> Graph:
        """Forward and backward in one graph, or forward alone, to be rewritten in place."""
        return self._state.gm.graph

    @property
    def sites(self) -> tuple[Found, ...]:
        """The matmuls, each as far as the passes before have brought it; see ``quartet.passes.sites``."""
        return self._state.sites

    def at(self, phase: type[Phase]) -> list[Phase]:
        """The matmuls that have come to a phase, ``Planned`` for example, or further."""
        return self._state.at(phase)

    def current(self, node: Node) -> Node:
        """What stands for a node of a site now."""
        return self._state.current(node)

    def replace(self, old: Node, new: Node) -> None:
        """Every user of ``old`` reads ``new`` instead, and the passes that come take it for ``old``."""
        self._state.replace(old, new)

    def build(self, before: Node) -> Builder:
        """``build(op, *arguments)`` inserts nodes before one, in its direction and with its metadata."""
        return Builder(self.graph, like=before, before=before, backward=is_backward(before))


def pass_of(function: Callable[[Stage], Any]) -> GraphPass:
    """A user's function as a pass that may be left out. Its errors are ExtensionErrors that name it."""
    @wraps(function)
    def run(state: State) -> None:
        try:
            with editing(state.gm):
                function(Stage(state))
        except Exception as error:
            raise ExtensionError(f"pass {function.__name__!r} failed: {type(error).__name__}: {error}") from error

    return GraphPass(run, optional=True, summary=(function.__doc__ or "").strip().partition("\n")[0])
