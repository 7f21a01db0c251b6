"""Graphs on disk: what each pass made of them, as Python that runs, and the matmuls as table and drawing."""

from __future__ import annotations

import functools
import html
import json
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Concatenate, ParamSpec

import networkx as nx
import torch
from torch import fx

from quartet.kernels.files import opener, write_text
from quartet.lowering.recipe.records import MatmulRecord, SavedRecord
from quartet.passes.compilation import Observer
from quartet.report.graph_code import op_name, print_graph
from quartet.report.svg import dataflow, draw, kind_of
from quartet.report.table import Report, page, saved_table

log = logging.getLogger(__name__)
P = ParamSpec("P")


def op_counts(gm: fx.GraphModule) -> Counter[str]:
    """How often each operation occurs: ``{"aten.mm": 7}``."""
    return Counter(op_name(n) for n in gm.graph.nodes if n.op.startswith("call_"))


def count_diff(before: Counter[str], after: Counter[str]) -> dict[str, int]:
    """Operations whose number changed, additions first, largest change first."""
    change = {op: after[op] - before[op] for op in {*before, *after} if after[op] != before[op]}
    return dict(sorted(change.items(), key=lambda item: (item[1] < 0, -abs(item[1]), item[0])))


def format_diff(change: dict[str, int]) -> str:
    """``"+14 quartet.quantize, -7 aten.mm"``, or ``"no op added or removed"``."""
    return ", ".join(f"{n:+d} {op}" for op, n in change.items()) or "no op added or removed"


@dataclass
class _Step:
    name: str
    stem: str
    before: Counter[str]
    seconds: float = 0.0
    change: dict[str, int] = field(default_factory=dict)


@dataclass
class _Graph:
    """What is known of the graph that is being compiled."""

    name: str
    folder: Path | None
    steps: dict[int, _Step] = field(default_factory=dict)
    flow: nx.DiGraph | None = None
    flow_after: str = ""
    flow_quantized: int = 0
    finished: bool = False


def _harmless(method: Callable[Concatenate[GraphDump, P], None]) -> Callable[Concatenate[GraphDump, P], None]:
    """A dump that fails warns once and lets the compilation go on."""

    @functools.wraps(method)
    def guarded(self: GraphDump, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            log.debug("dump failed", exc_info=True)
            if not self.failed:
                warnings.warn(f"quartet could not dump a graph to {self.directory}: {type(error).__name__}: {error}; "
                              "compilation goes on", stacklevel=2)
            self.failed = True

    return guarded


class GraphDump(Observer):
    """Observer of the pipeline that writes every graph before and after every pass.

    Each compiled graph gets a folder of its own under ``directory``: ``graph_000``, ``graph_001``, …
    (``rank3_graph_000`` under torch.distributed), with

        index.html               passes, op-count diffs, the table and the drawing
        03_quantize.before.py    the graph, runnable
        03_quantize.after.py
        03_quantize.diff.txt     operations added and removed, seconds
        matmuls.json             the report as data
        matmuls.svg              the dataflow between matmuls, after the last pass with the most quantised ones
        saved.forward.py         where activations are saved in eight bits: the two graphs after partitioning,
        saved.backward.py        and what is kept between them
        saved.txt, saved.json

    A failure to write never stops a compilation: it warns once, and ``failed`` is True.

    Args:
        directory: where to write, made when missing; None writes nothing, for ``emit_artifact`` alone.
        emit_artifact: receives (name, text) of each text file as well, for ``TORCH_TRACE`` and tlparse.
    """

    def __init__(self, directory: str | Path | None, emit_artifact: Callable[[str, str], None] | None = None) -> None:
        self.directory = None if directory is None else Path(directory)
        self.emit_artifact = emit_artifact
        self.failed = False
        self._graph: _Graph | None = None
        self._unwritten = 0

    @property
    def folder(self) -> Path | None:
        """Folder of the graph that is being compiled, or was compiled last."""
        return self._graph.folder if self._graph is not None else None

    @_harmless
    def before(self, index: int, name: str, gm: fx.GraphModule) -> None:
        """A pass is about to run. An index that does not exceed the last one begins a new graph."""
        graph = self._graph
        if graph is None or graph.finished or index <= max(graph.steps, default=-1):
            graph = self._open()
        step = graph.steps[index] = _Step(name, f"{index:02d}_{name}", op_counts(gm))
        self._code(graph, f"{step.stem}.before", f"{graph.name}, before pass {index} {name}", gm)

    @_harmless
    def after(self, index: int, name: str, gm: fx.GraphModule, seconds: float) -> None:
        """A pass has run, in ``seconds``."""
        graph = self._graph
        if graph is None or index not in graph.steps:
            raise RuntimeError(f"after({index}, {name!r}) without before({index}, {name!r})")
        step = graph.steps[index]
        step.seconds, counts = seconds, op_counts(gm)
        step.change = count_diff(step.before, counts)
        quantized = sum(kind_of(n) == "matmul" for n in gm.graph.nodes if n.op == "call_function")
        if quantized >= graph.flow_quantized:
            graph.flow, graph.flow_after, graph.flow_quantized = dataflow(gm), name, quantized
        lines = [f"{index:02d} {name}, {seconds * 1e3:.1f} ms", *(f"{n:+6d} {op}" for op, n in step.change.items())]
        self._text(graph, f"{step.stem}.diff.txt", "\n".join(lines) + "\n")
        self._code(graph, f"{step.stem}.after", f"{graph.name}, after pass {index} {name}", gm)

    @_harmless
    def finish(self, records: Sequence[MatmulRecord] | Report, gm: fx.GraphModule) -> None:
        """The pipeline is done: write the table, the drawing and the index; the next ``before`` opens a new graph."""
        graph = self._open() if self._graph is None or self._graph.finished else self._graph
        report = records if isinstance(records, Report) else Report(records)
        flow = graph.flow if graph.flow is not None else dataflow(gm)
        where = f" after pass {graph.flow_after}" if graph.flow_after else ""
        drawing = draw(flow, f"{graph.name}: matmuls{where}")
        self._text(graph, "matmuls.json", json.dumps(report.to_dict(), indent=1) + "\n")
        self._text(graph, "matmuls.svg", drawing)
        self._text(graph, "index.html", _index(graph, report, drawing))
        graph.finished = True

    @_harmless
    def saved(self, records: Sequence[SavedRecord], forward: fx.GraphModule, backward: fx.GraphModule) -> None:
        """The graph was split and what forward keeps was encoded: write both parts and the table."""
        graph = self._graph if self._graph is not None else self._open()
        self._text(graph, "saved.txt", saved_table(records) + "\n")
        self._text(graph, "saved.json", json.dumps([record.as_dict() for record in records], indent=1) + "\n")
        for name, gm in (("forward", forward), ("backward", backward)):
            self._code(graph, f"saved.{name}", f"{graph.name}, {name} after partitioning", gm)

    def _open(self) -> _Graph:
        prefix = ""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            prefix = f"rank{torch.distributed.get_rank()}_"
        number = 0
        if self.directory is None:
            number, self._unwritten = self._unwritten, self._unwritten + 1
            self._graph = _Graph(f"{prefix}graph_{number:03d}", None)
            return self._graph
        self.directory.mkdir(parents=True, exist_ok=True)
        while True:
            folder = self.directory / f"{prefix}graph_{number:03d}"
            try:
                folder.mkdir()
            except FileExistsError:
                number += 1
                continue
            self._graph = _Graph(folder.name, folder)
            return self._graph

    def _text(self, graph: _Graph, name: str, text: str) -> None:
        if graph.folder is not None:
            write_text(graph.folder / name, text)
        if self.emit_artifact is not None:
            self.emit_artifact(f"quartet_{graph.name}_{name}", text)

    def _code(self, graph: _Graph, stem: str, title: str, gm: fx.GraphModule) -> None:
        code = print_graph(gm, title, f"{stem}.constants.pt")
        self._text(graph, f"{stem}.py", code.source)
        if code.constants and graph.folder is not None:
            with open(graph.folder / f"{stem}.constants.pt", "wb", opener=opener) as file:
                torch.save(code.constants, file)


def _index(graph: _Graph, report: Report, drawing: str) -> str:
    rows = []
    for index, step in sorted(graph.steps.items()):
        links = " ".join(f'<a href="{html.escape(step.stem)}.{side}.py">{side}</a>' for side in ("before", "after"))
        cells = (f"<td class=num>{index}</td>", f"<td>{html.escape(step.name)}</td>", f"<td>{links}</td>",
                 f"<td class=num>{step.seconds * 1e3:.1f} ms</td>",
                 f"<td>{html.escape(format_diff(step.change))}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    passes = ('<div class="quartet"><table><thead><tr><th></th><th>pass</th><th>graph</th><th>time</th>'
              f'<th>operations</th></tr></thead><tbody>\n{chr(10).join(rows)}\n</tbody></table></div>')
    return page(f"quartet: {graph.name}", f'<h2>Passes</h2>{passes}<h2>Matmuls</h2>'
                f'<p><a href="matmuls.json">as data</a></p>{report.html_fragment()}<h2>Dataflow</h2>'
                f'<p><a href="matmuls.svg">alone</a></p><div class="wide" style="overflow:auto">{drawing}</div>')
