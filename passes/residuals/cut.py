"""The minimum cut by which PyTorch's partitioner divides a joint graph, for networks most of which is decided.

An edge of infinite capacity is never cut. So what the source reaches along such edges is on its side, and what reaches
the sink along them on the sink's: in a model nearly everything, as products and inputs cannot run again and gradients
need what they read. Between the two sides remain small regions, such as a norm or a rotary embedding, each cut by
Dinic's algorithm.

Of cuts that are equal, that nearest to the sink is taken, as by ``networkx.minimum_cut``: it is the same whatever found
the flow, the vertices that still reach the sink.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from math import inf, isinf
from typing import Any

Cut = tuple[Any, tuple[set[Any], set[Any]]]  # its capacity; the source's side and the sink's


def minimum_cut(graph: Any, source: Any, sink: Any) -> Cut | None:
    """The minimum cut of a ``networkx.DiGraph`` whose edges have ``capacity``, infinite where they have none.

    None where there is none, because an infinite path leads to the sink, or where it is not a matter of whole numbers.
    """
    capacities = {u: {v: edge.get("capacity", inf) for v, edge in edges.items() if u != v}
                  for u, edges in graph.adjacency()}
    if any(not isinf(c) and c % 1 != 0 for edges in capacities.values() for c in edges.values()):
        return None
    backwards: dict[Any, list[Any]] = {node: [] for node in capacities}
    for u, edges in capacities.items():
        for v, capacity in edges.items():
            if isinf(capacity):
                backwards[v].append(u)
    first = _reached(source, {u: [v for v, c in edges.items() if isinf(c)] for u, edges in capacities.items()})
    last = _reached(sink, backwards)
    if sink in first:
        return None
    flow = _Flow()
    for u, edges in capacities.items():
        if u not in last:
            for v, capacity in edges.items():
                if v not in first and capacity > 0:
                    flow.add(source if u in first else u, sink if v in last else v,
                             capacity if isinf(capacity) else int(capacity))
    value = flow.most(source, sink)
    after = last | flow.reaching(sink)
    return value, (set(capacities) - after, after)


def _reached(start: Any, following: Mapping[Any, Iterable[Any]]) -> set[Any]:
    found, todo = {start}, [start]
    while todo:
        for node in following[todo.pop()]:
            if node not in found:
                found.add(node)
                todo.append(node)
    return found


class _Flow:
    """A flow through a network; of each edge what it can still take, and after it the same of the way back."""

    def __init__(self) -> None:
        self._from: dict[Any, list[int]] = {}  # the edges that begin at a node
        self._end: list[Any] = []
        self._rest: list[Any] = []

    def add(self, u: Any, v: Any, capacity: Any) -> None:
        for start, end, rest in ((u, v, capacity), (v, u, 0)):
            self._from.setdefault(start, []).append(len(self._end))
            self._end.append(end)
            self._rest.append(rest)

    def most(self, source: Any, sink: Any) -> Any:
        """Send as much from the source to the sink as can be."""
        sent = 0
        while (levels := self._levels(source, sink)) is not None:
            tried = dict.fromkeys(levels, 0)  # how many of a node's edges lead nowhere at this level
            while amount := self._send(source, sink, levels, tried):
                sent += amount
        return sent

    def reaching(self, sink: Any) -> set[Any]:
        """The nodes from which more could still go to the sink."""
        found, todo = {sink}, [sink]
        while todo:
            for edge in self._from.get(todo.pop(), ()):
                node = self._end[edge]
                if self._rest[edge ^ 1] > 0 and node not in found:
                    found.add(node)
                    todo.append(node)
        return found

    def _levels(self, source: Any, sink: Any) -> dict[Any, int] | None:
        """How many edges each node is from the source; None where the sink is not reached any more."""
        levels, todo = {source: 0}, deque([source])
        while todo:
            node = todo.popleft()
            for edge in self._from.get(node, ()):
                end = self._end[edge]
                if self._rest[edge] > 0 and end not in levels:
                    levels[end] = levels[node] + 1
                    todo.append(end)
        return levels if sink in levels else None

    def _send(self, source: Any, sink: Any, levels: Mapping[Any, int], tried: dict[Any, int]) -> Any:
        """Fill one shortest path; how much went along it, 0 where there is none left."""
        path: list[int] = []
        node = source
        while node != sink:
            edges = self._from.get(node, ())
            while tried[node] < len(edges):
                edge = edges[tried[node]]
                if self._rest[edge] > 0 and levels.get(self._end[edge]) == levels[node] + 1:
                    path.append(edge)
                    node = self._end[edge]
                    break
                tried[node] += 1
            else:
                if not path:
                    return 0
                node = self._end[path.pop() ^ 1]
                tried[node] += 1
        amount = min(self._rest[edge] for edge in path)
        for edge in path:
            self._rest[edge] -= amount
            self._rest[edge ^ 1] += amount
        return amount
