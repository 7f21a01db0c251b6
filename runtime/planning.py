"""How large Inductor's planner of memory takes what a graph is given to be."""

from __future__ import annotations

from typing import Any

from quartet.runtime.compat import StarDep


def count_inputs_once(graph: Any) -> None:
    """Let no read of an input count for more bytes than the input has, in a graph that Inductor is lowering.

    ``get_freeable_input_buf`` of torch/_inductor/memory.py takes an input for as large as the loops that read it, so
    kept scales of groups for as large as what they scale. By that a backward would decode all that attention reads when
    it begins, to be rid of the scales, and hold buffers for reuse below a peak that there is not.
    """
    theirs = graph.get_dep_size_hint

    def size(dep: Any, *how: Any) -> Any:
        read = theirs(dep, *how)
        return min(read, theirs(StarDep(dep.name), *how)) if dep.name in graph.graph_inputs else read

    if "get_dep_size_hint" not in vars(graph):
        graph.get_dep_size_hint = size
