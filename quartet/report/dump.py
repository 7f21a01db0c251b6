"""Graphs on disk: what each pass made of them, as Python that runs, and the matmuls as table and drawing."""

from __future__ import annotations

import functools
import json
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import unified_diff
from pathlib import Path
from typing import Concatenate, ParamSpec

import networkx as nx
import torch
from markupsafe import Markup
from torch import fx

from quartet.kernels.files import opener, write_text
from quartet.lowering.recipe.records import MatmulRecord, SavedRecord
from quartet.passes.compilation import Observer
from quartet.report import pages
from quartet.report.graph_code import GraphCode, op_name, print_graph
from quartet.report.pages import content
from quartet.report.rows import saved_table
from quartet.report.svg import dataflow, draw, kind_of
from quartet.report.table import Report
from quartet.report.text import human_bytes

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
    """A pass: the file of the graph after it, and the lines that changed; none where it changed nothing."""

    name: str
    before: Counter[str]
    file: str = ""
    seconds: float = 0.0
    change: dict[str, int] = field(default_factory=dict)
    diff: list[str] = field(default_factory=list)


@dataclass
class _Graph:
    """What is known of the graph that is being compiled, and the file and lines of it that were written last."""

    name: str
    folder: Path | None
    steps: dict[int, _Step] = field(default_factory=dict)
    file: str = ""
    lines: list[str] = field(default_factory=list)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    flow: nx.DiGraph | None = None
    flow_after: str = ""
    flow_quantized: int = 0
    finished: bool = False
    report: Report | None = None
    nodes: int = 0
    drawing: str = ""


def _harmless(method: Callable[Concatenate[GraphDump, P], None]) -> Callable[Concatenate[GraphDump, P], None]:
    """A dump that fails warns once and lets the compilation go on."""

    @functools.wraps(method)
    def guarded(self: GraphDump, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            log.debug("dump failed", exc_info=True)
            said = f"{type(error).__name__}: {error}"
            if not self.failure:
                warnings.warn(f"quartet could not dump a graph to {self.directory}: {said}; compilation goes on",
                              stacklevel=2)
            self.failure = self.failure or said

    return guarded


class GraphDump(Observer):
    """Observer of the pipeline that writes every graph before and after every pass.

    Each compiled graph gets a folder of its own under ``directory``: ``graph_000``, ``graph_001``, …
    (``rank3_graph_000`` under torch.distributed), which ``directory/index.html`` lists, with

        index.html               what was compiled, passes with the lines that they changed, the drawing, the table
        00_captured.py           the graph before the first pass, runnable
        03_quantize.py           after a pass, where that has changed it
        03_quantize.diff         the lines that it has changed
        matmuls.json             the report as data
        matmuls.svg              the dataflow between matmuls, after the last pass with the most quantised ones
        about.json               what was compiled: policy, device, options, versions
        saved.forward.py         where activations are saved in eight bits: the two graphs after partitioning,
        saved.backward.py        and what is kept between them
        saved.txt, saved.json

    A failure to write never stops a compilation: it warns once, and ``failure`` says what it was.

    Args:
        directory: where to write, made when missing; None writes nothing, for ``emit_artifact`` alone.
        emit_artifact: receives (name, text) of each text file as well, for ``TORCH_TRACE`` and tlparse.
        about: what is compiled, in words, for the page.
        names: of the parameters behind a graph's placeholders.
    """

    def __init__(self, directory: str | Path | None, emit_artifact: Callable[[str, str], None] | None = None,
                 about: Mapping[str, str] | None = None,
                 names: Callable[[fx.Graph], Mapping[str, str]] = lambda graph: {}) -> None:
        self.directory = None if directory is None else Path(directory)
        self.about, self.names = dict(about or {}), names
        self.emit_artifact = emit_artifact
        self.failure = ""
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
        graph.steps[index] = _Step(name, op_counts(gm))
        if not graph.file:
            self._changed(graph, "00_captured", f"{graph.name}, before the first pass", gm)

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
        stem = f"{index:02d}_{name}"
        step.diff = self._changed(graph, stem, f"{graph.name}, after pass {index} {name}", gm)
        step.file = graph.file
        if step.diff:
            self._text(graph, f"{stem}.diff", "\n".join(step.diff) + "\n")

    @_harmless
    def finish(self, records: Sequence[MatmulRecord] | Report, gm: fx.GraphModule) -> None:
        """The pipeline is done: write the table, the drawing and the pages; the next ``before`` opens a new graph."""
        graph = self._open() if self._graph is None or self._graph.finished else self._graph
        graph.report = records if isinstance(records, Report) else Report(
            records, policy=self.about.get("policy"), device=self.about.get("device"))
        flow = graph.flow if graph.flow is not None else dataflow(gm)
        where = f" after pass {graph.flow_after}" if graph.flow_after else ""
        graph.drawing, graph.nodes = draw(flow, f"{graph.name}: matmuls{where}"), sum(op_counts(gm).values())
        self._text(graph, "matmuls.svg", graph.drawing)
        self._pages(graph)
        graph.finished = True

    @_harmless
    def kept(self, size: int) -> None:
        """The graph was split: forward leaves so many bytes for backward, which the pages then say."""
        graph = self._graph
        if graph is not None and graph.report is not None:
            graph.report.saved_bytes_total = size
            self._pages(graph)

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

    def _pages(self, graph: _Graph) -> None:
        """Write what shows the report."""
        report = graph.report
        assert report is not None
        self._text(graph, "matmuls.json", json.dumps(report.to_dict(), indent=1) + "\n")
        self._text(graph, "about.json", json.dumps(
            {**self.about, "lowered": f"{len(report.lowered)} of {len(report)}", "operations": graph.nodes,
             "kept": human_bytes(report.saved_bytes_total)}, indent=1) + "\n")
        self._text(graph, "index.html", _page(graph, report, self.about))
        if self.directory is not None:
            write_text(self.directory / "index.html", _listing(self.directory))

    def _text(self, graph: _Graph, name: str, text: str) -> None:
        if graph.folder is not None:
            write_text(graph.folder / name, text)
        if self.emit_artifact is not None:
            self.emit_artifact(f"quartet_{graph.name}_{name}", text)

    def _changed(self, graph: _Graph, stem: str, title: str, gm: fx.GraphModule) -> list[str]:
        """Write a graph if it is another one than was written last; the lines that differ."""
        code = print_graph(gm, title, f"{stem}.constants.pt", self.names(gm.graph))
        lines = code.source.replace(f"{stem}.constants.pt", "constants.pt").splitlines()[1:]
        same = lines == graph.lines and code.constants.keys() == graph.constants.keys() and all(
            torch.equal(value, graph.constants[name]) for name, value in code.constants.items())
        if same:
            return []
        diff = list(unified_diff(graph.lines, lines, graph.file, f"{stem}.py", lineterm="")) if graph.file else []
        self._write(graph, stem, code)
        graph.file, graph.lines, graph.constants = f"{stem}.py", lines, code.constants
        return diff or ["other constants"]

    def _code(self, graph: _Graph, stem: str, title: str, gm: fx.GraphModule) -> None:
        self._write(graph, stem, print_graph(gm, title, f"{stem}.constants.pt", self.names(gm.graph)))

    def _write(self, graph: _Graph, stem: str, code: GraphCode) -> None:
        self._text(graph, f"{stem}.py", code.source)
        if code.constants and graph.folder is not None:
            with open(graph.folder / f"{stem}.constants.pt", "wb", opener=opener) as file:
                torch.save(code.constants, file)


def _page(graph: _Graph, report: Report, about: Mapping[str, str]) -> str:
    kinds = {"+": "add", "-": "del", "@": "at"}
    steps = [{"index": index, "name": step.name, "file": step.file, "time": f"{step.seconds * 1e3:.1f} ms",
              "change": format_diff(step.change),
              "diff": [{"text": line, "kind": kinds.get(line[:1], "")} for line in step.diff]}
             for index, step in sorted(graph.steps.items())]
    return pages.render("graph.html", title=f"quartet: {graph.name}", about=about, steps=steps, nodes=graph.nodes,
                        final=graph.file, drawing=Markup(graph.drawing), **content.data_of(report))


def _listing(directory: Path) -> str:
    """The page of all graphs that a folder holds."""
    header = ("policy", "device", "lowered", "kept", "operations", "compiled")
    graphs = []
    for path in sorted(directory.glob("*graph_*/about.json")):
        about = json.loads(path.read_text(encoding="utf-8"))
        graphs.append({"name": path.parent.name, "cells": [str(about.get(name, "")) for name in header]})
    return pages.render("graphs.html", title="quartet: graphs", header=("graph", *header), graphs=graphs)
