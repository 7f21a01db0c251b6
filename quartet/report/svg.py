"""A drawing of the matmuls of a graph: forward runs down on the left, backward climbs on the right.

``dataflow`` keeps the matmuls and the semantic ops of a graph and joins two of them where data flows from
one to the other through anything else, without the edges that a longer path implies. ``draw`` puts each in
the row of its topological generation and writes SVG.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from statistics import mean

import networkx as nx
import torch
from torch import fx

from quartet.passes.naming import module_of
from quartet.report.graph_code import describe, is_backward, op_name
from quartet.report.text import shorten

MATMULS = frozenset(f"aten.{name}" for name in (
    "mm", "bmm", "addmm", "baddbmm", "_scaled_mm", "_scaled_mm_v2", "_grouped_mm", "_scaled_grouped_mm",
    "_scaled_grouped_mm_v2"))
UNDRAWN = frozenset(f"quartet.{name}" for name in ("signs", "fixed_signs", "seed", "sign_table", "random_bits"))
MAX_SITES = 40
BOX, GAP, ROW, MARGIN, TOP = (170, 34), 14, 58, 24, 92


@dataclass(frozen=True)
class Box:
    """One drawn op: ``kind`` is ``"matmul"`` (quantised), ``"alone"`` or ``"op"`` (transform, quantise, …)."""

    op: str
    module: str
    value: str
    kind: str
    backward: bool


def kind_of(node: fx.Node) -> str | None:
    """The ``Box`` kind of a call, or None for one that is not drawn."""
    name = op_name(node)
    if name in MATMULS:
        return "alone"
    if not name.startswith("quartet.") or name in UNDRAWN:
        return None
    return "matmul" if name.endswith("mm") else "op"


def _site(node: fx.Node) -> object:
    return node.meta.get("seq_nr", node.name)


def dataflow(gm: fx.GraphModule, max_sites: int | None = MAX_SITES) -> nx.DiGraph:
    """The matmuls and semantic ops of a graph and how data flows between them.

    Args:
        gm: any graph; tags, names and values are read from the nodes' ``meta``.
        max_sites: keep the first so many forward matmuls and what shares their ``seq_nr``; None keeps all.

    Returns:
        a graph whose nodes are names of FX nodes with a ``Box`` as attribute ``box``; it is its own transitive
        reduction. ``graph["sites"]`` and ``graph["drawn_sites"]`` count forward matmuls before and after the limit.
    """
    calls = [n for n in gm.graph.nodes if n.op == "call_function"]
    kinds = {n: kind for n in calls if (kind := kind_of(n)) is not None}
    matmuls = [n for n, kind in kinds.items() if kind != "op"]
    sites = list(dict.fromkeys(_site(n) for n in [m for m in matmuls if not is_backward(m)] or matmuls))
    kept = set(sites[:max_sites])
    flow = nx.DiGraph(sites=len(sites), drawn_sites=len(kept))
    bits: dict[int, str] = {}
    above: dict[str, int] = {}
    frontier: dict[fx.Node, int] = {}
    for node in gm.graph.nodes:
        reached = 0
        for source in node.all_input_nodes:
            reached |= frontier.get(source, 0)
        nearest = _unimplied(reached, bits, above)
        if node in kinds and (len(kept) == len(sites) or _site(node) in kept):
            value = describe(_first(node.meta.get("val")))
            flow.add_node(node.name, box=Box(op_name(node).partition(".")[2], module_of(node), value, kinds[node],
                                             is_backward(node)))
            above[node.name] = 0
            for bit in _bits(nearest):
                flow.add_edge(bits[bit], node.name)
                above[node.name] |= 1 << bit | above[bits[bit]]
            bits[len(bits)] = node.name
            nearest = 1 << len(bits) - 1
        frontier[node] = nearest
    return flow


def _first(value: object) -> object:
    return value[0] if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor) else value


def _bits(mask: int) -> Iterator[int]:
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest


def _unimplied(mask: int, names: dict[int, str], above: dict[str, int]) -> int:
    """``mask`` without the ops that another op in it already depends on."""
    implied = 0
    for bit in _bits(mask):
        implied |= above[names[bit]]
    return mask & ~implied


def _generations(flow: nx.DiGraph) -> dict[str, int]:
    """Topological generation of each op; what has no matmul before it sits just above its first reader."""
    row = {name: i for i, layer in enumerate(nx.topological_generations(flow)) for name in layer}
    early: set[str] = set()
    order = list(nx.topological_sort(flow))
    for name in order:
        if flow.nodes[name]["box"].kind == "op" and all(p in early for p in flow.predecessors(name)):
            early.add(name)
    for name in reversed(order):
        if name in early and (readers := [row[s] for s in flow.successors(name)]):
            row[name] = min(readers) - 1
    lowest = min(row.values(), default=0)
    return {name: r - lowest for name, r in row.items()}


def _columns(flow: nx.DiGraph, row: dict[str, int]) -> dict[str, float]:
    """Horizontal position within each row, in boxes, by a few barycentre sweeps."""
    layers: dict[int, list[str]] = {}
    for name, r in row.items():
        layers.setdefault(r, []).append(name)
    x = {name: i - (len(names) - 1) / 2 for names in layers.values() for i, name in enumerate(names)}
    for sweep in range(6):
        for r in sorted(layers, reverse=bool(sweep % 2)):
            neighbours = flow.successors if sweep % 2 else flow.predecessors
            pull = {n: mean([x[m] for m in neighbours(n)] or [x[n]]) for n in layers[r]}
            layers[r].sort(key=pull.__getitem__)
            centre = mean(pull.values())
            for i, name in enumerate(layers[r]):
                x[name] = centre + i - (len(layers[r]) - 1) / 2
    left = min(x.values(), default=0.0)
    return {name: position - left for name, position in x.items()}


STYLE = """
.dataflow { font: 11px system-ui, sans-serif; background: #fff; }
.dataflow text { fill: #1c1f24; } .dataflow .small { font-size: 9.5px; opacity: .8; }
.dataflow .title { font-size: 15px; }
.dataflow .forward { stroke: #2f6fd0; fill: #d9e7fd; } .dataflow .backward { stroke: #c2641a; fill: #fde6d3; }
.dataflow .op { fill-opacity: .4; stroke-opacity: .5; } .dataflow .alone { stroke-dasharray: 5 3; fill-opacity: 0; }
.dataflow path { fill: none; stroke: #7d8694; stroke-width: 1; }
.dataflow .saved { stroke: #2a8f62; stroke-dasharray: 2 3; opacity: .6; }
@media (prefers-color-scheme: dark) {
  .dataflow { background: #16181d; } .dataflow text { fill: #e6e8ec; }
  .dataflow .forward { fill: #1d3457; } .dataflow .backward { fill: #50300f; } .dataflow .saved { stroke: #4cc08e; }
}
"""


def draw(flow: nx.DiGraph, title: str = "Matmul dataflow") -> str:
    """SVG text of a ``dataflow`` graph; dotted edges are values kept between forward and backward."""
    boxes: dict[str, Box] = {name: data["box"] for name, data in flow.nodes(data=True)}
    halves = [flow.subgraph([n for n in flow if boxes[n].backward is side]) for side in (False, True)]
    rows = [_generations(half) for half in halves]
    height = max((max(row.values(), default=0) for row in rows), default=0)
    centre: dict[str, tuple[float, float]] = {}
    left = float(MARGIN)
    for half, row, backward in zip(halves, rows, (False, True), strict=True):
        if not row:
            continue
        stretch = height / max(max(row.values()), 1)
        columns = _columns(half, row)
        for name, column in columns.items():
            y = (height - row[name] * stretch) if backward else row[name] * stretch
            centre[name] = (left + column * (BOX[0] + GAP) + BOX[0] / 2, TOP + y * ROW + BOX[1] / 2)
        left += (max(columns.values()) + 1) * (BOX[0] + GAP) + 2 * MARGIN
    wide, high = max(left, 840.0), TOP + height * ROW + BOX[1] + MARGIN
    out = [f'<svg class="dataflow" xmlns="http://www.w3.org/2000/svg" width="{wide:.0f}" height="{high:.0f}" '
           f'viewBox="0 0 {wide:.0f} {high:.0f}" role="img"><title>{escape(title)}</title><style>{STYLE}</style>']
    note = "" if flow.graph["drawn_sites"] == flow.graph["sites"] else (
        f" · the first {flow.graph['drawn_sites']} of {flow.graph['sites']} forward matmuls")
    out.append(f'<text class="title" x="{MARGIN}" y="26">{escape(title + note)}</text>')
    out += _legend()
    out += [_edge(centre[a], centre[b], boxes[a].backward, boxes[b].backward) for a, b in flow.edges]
    out += [_box(boxes[name], *place) for name, place in centre.items()]
    return "\n".join([*out, "</svg>"]) + "\n"


def _legend() -> list[str]:
    out = []
    entries = (("forward", "forward, quantised"), ("backward", "backward, quantised"),
               ("forward alone", "matmul left alone"), ("forward op", "rotate, quantise, …"))
    for i, (style, text) in enumerate(entries):
        x, radius = MARGIN + i * 165, 7 if "op" in style else 3
        out.append(f'<rect class="{style}" x="{x}" y="42" width="22" height="14" rx="{radius}"/>'
                   f'<text x="{x + 28}" y="53">{text}</text>')
    x = MARGIN + len(entries) * 165
    return [*out, f'<path class="saved" d="M{x} 49h24"/><text x="{x + 30}" y="53">kept for backward</text>']


def _box(box: Box, x: float, y: float) -> str:
    side = "backward" if box.backward else "forward"
    style = side if box.kind == "matmul" else f"{side} {box.kind}"
    hover = escape(f"{box.op}\n{box.module}\n{box.value}\n{side}")
    head = escape(shorten(f"{box.op} {box.value}", 26))
    foot = escape(shorten(box.module, 28))
    radius = BOX[1] / 2 if box.kind == "op" else 5
    return (f'<g><title>{hover}</title><rect class="{style}" x="{x - BOX[0] / 2:.1f}" y="{y - BOX[1] / 2:.1f}" '
            f'width="{BOX[0]}" height="{BOX[1]}" rx="{radius}"/>'
            f'<text text-anchor="middle" x="{x:.1f}" y="{y - 2:.1f}">{head}</text>'
            f'<text class="small" text-anchor="middle" x="{x:.1f}" y="{y + 11:.1f}">{foot}</text></g>')


def _edge(a: tuple[float, float], b: tuple[float, float], from_backward: bool, to_backward: bool) -> str:
    if from_backward != to_backward:
        (x0, y0), (x1, y1) = (a[0] + BOX[0] / 2, a[1]), (b[0] - BOX[0] / 2, b[1])
        bend = (x1 - x0) / 2
        return (f'<path class="saved" d="M{x0:.1f} {y0:.1f}C{x0 + bend:.1f} {y0:.1f} {x1 - bend:.1f} {y1:.1f} '
                f'{x1:.1f} {y1:.1f}"/>')
    away = -BOX[1] / 2 if to_backward else BOX[1] / 2
    (x0, y0), (x1, y1) = (a[0], a[1] + away), (b[0], b[1] - away)
    bend = (y1 - y0) / 2
    return f'<path d="M{x0:.1f} {y0:.1f}C{x0:.1f} {y0 + bend:.1f} {x1:.1f} {y1 - bend:.1f} {x1:.1f} {y1:.1f}"/>'
