"""The table "matmul → kernel, or why not", as text and data."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from textwrap import wrap
from typing import Any

import torch

from quartet.lowering.recipe.records import MatmulRecord, MemoryRecord, SavedRecord
from quartet.lowering.recipe.types import ROLES
from quartet.report import memory as frontiers
from quartet.report.difference import Difference
from quartet.report.pages import content
from quartet.report.rows import HEADER, RIGHT, remarks, rows, saved_table
from quartet.report.text import human_bytes, percent, shorten

WIDTH = 140
FAIR = (34, 6, 5, 4, 14, 5, 7, 12, 10, 4)
LEAST = (8, 6, 5, 2, 10, 5, 6, 7, 8, 3)
DISPENSABLE = ("dtype", "class", "×")


class Report:
    """What the compiler did with each matmul of a model.

    Iterates over its records. ``str(report)`` is a table of at most ``WIDTH`` columns in which equal layers
    share a row; ``to_dict()`` and ``table(collapse=False)`` have one entry a matmul.

    Args:
        records: one for each forward, dgrad and wgrad matmul, in graph order.
        saved_bytes_total: bytes kept between forward and backward by the whole graph; None sums the records.
        torch_version: version of torch that compiled, by default the running one.
        device: what it was compiled for, ``"cuda:0 (NVIDIA H200)"``.
        policy: the policy as text.
        notes: remarks on the whole graph.
        saved: what is kept between forward and backward, where the policy is about it or a budget.
        memory: what was chosen for a budget, a record a graph.
        predicted: how many times faster the linear layers are than in the model's dtype; None where that is not known.
        graphs: address of the dump of its graphs, for a link.
    """

    def __init__(self, records: Iterable[MatmulRecord], saved_bytes_total: int | None = None, *,
                 torch_version: str | None = None, device: str | None = None, policy: str | None = None,
                 notes: Iterable[str] = (), saved: Iterable[SavedRecord] = (),
                 memory: Iterable[MemoryRecord] = (), predicted: float | None = None,
                 graphs: str | None = None) -> None:
        self.records = tuple(records)
        self.torch_version = torch_version or torch.__version__
        self.device = device
        self.policy = policy
        self.notes = tuple(notes)
        self.saved = tuple(saved)
        self.memory = tuple(memory)
        self.predicted = predicted
        self.graphs = graphs
        known = [r.saved_bytes for r in self.records if r.saved_bytes is not None]
        self.saved_bytes_total = saved_bytes_total if saved_bytes_total is not None else sum(known) if known else None

    def __iter__(self) -> Iterator[MatmulRecord]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def lowered(self) -> tuple[MatmulRecord, ...]:
        """Matmuls that a kernel of ours runs."""
        return tuple(r for r in self.records if r.lowered)

    @property
    def left_alone(self) -> tuple[MatmulRecord, ...]:
        """Matmuls that stay in the model's dtype."""
        return tuple(r for r in self.records if not r.lowered)

    @property
    def reasons(self) -> dict[str, int]:
        """Distinct reasons of the matmuls left alone, in order of appearance, with how many each explains."""
        return dict(Counter(remarks(r)[0] for r in self.left_alone))

    @property
    def remarks(self) -> dict[str, int]:
        """Every distinct remark, the reasons first, with how many matmuls carry it; numbered by position from 1."""
        every = Counter(text for r in self.records for text in remarks(r))
        return {text: every[text] for text in [*self.reasons, *every]}

    def flops_share(self, role: str | None = None) -> float | None:
        """Share of the FLOPs (of ``role``, or of all) in lowered matmuls; None when no size is static."""
        chosen = [(r.flops, r.lowered) for r in self.records if role in (None, r.role)]
        total = sum(f for f, _ in chosen if f is not None)
        return sum(f for f, low in chosen if f is not None and low) / total if total else None

    def summary(self) -> list[str]:
        """The lines under the table."""
        symbolic = sum(r.flops is None for r in self.records)
        shares = [(role, self.flops_share(role)) for role in ROLES]
        lines = [
            f"lowered   {len(self.lowered)} of {len(self.records)} matmuls",
            "FLOPs     " + ", ".join(f"{role} {percent(s)}" for role, s in shares if s is not None)
            + f"{'; ' if any(s is not None for _, s in shares) else ''}in total {percent(self.flops_share())}"
            + (f" ({symbolic} with symbolic sizes not counted)" if symbolic else ""),
            f"kept      {human_bytes(self.saved_bytes_total)} between forward and backward",
            *frontiers.memory_lines(self.memory),
            *([] if self.predicted is None else
              [f"predicted {self.predicted:.2f} times the speed of the linear layers in the model's dtype"]),
        ]
        for number, (text, count) in enumerate(self.remarks.items(), 1):
            lines.append(f"{f'[{number}]':<9} {count} × {text}")
        lines += [f"note      {note}" for note in self.notes]
        return lines

    def title(self) -> str:
        """One line: policy, device, torch."""
        parts = [f"policy {self.policy}" if self.policy else "", self.device or "", f"torch {self.torch_version}"]
        return "quartet · " + " · ".join(filter(None, parts))

    def table(self, collapse: bool = True, width: int = WIDTH) -> str:
        """The table alone, no line longer than ``width`` characters, 60 or more; where columns have no room, the least
        telling are left out: the dtype, the class, then how many."""
        if width < 60:
            raise ValueError(f"a report is at least 60 columns wide, not {width}")
        number = {text: f"[{i}]" for i, text in enumerate(self.remarks, 1)}
        cells = [[*row.cells(), " ".join(number[text] for text in row.remarks)] for row in rows(self.records, collapse)]
        for above, row in reversed(list(pairwise(cells))):
            if row[:2] == above[:2]:
                row[:2] = "", ""
        full = [max(map(len, column)) for column in zip(HEADER, *cells, strict=True)]
        shown = list(range(len(HEADER)))
        for name in DISPENSABLE:
            if sum(min(full[i], FAIR[i]) + 2 for i in shown) - 2 > width:
                shown.remove(HEADER.index(name))
        widths = [full[i] for i in shown]
        room = width - 2 * (len(widths) - 1)
        share = FAIR if sum(FAIR[i] for i in shown) <= room else LEAST
        while sum(widths) > room:
            widths[max(range(len(widths)), key=lambda i: widths[i] - share[shown[i]])] -= 1

        def line(values: Sequence[str]) -> str:
            return "  ".join(shorten(values[i], w).rjust(w) if HEADER[i] in RIGHT else shorten(values[i], w).ljust(w)
                             for i, w in zip(shown, widths, strict=True)).rstrip()

        rule = "─" * (sum(widths) + 2 * (len(widths) - 1))
        return "\n".join([line(HEADER), rule, *map(line, cells), rule])

    def text(self, width: int = WIDTH) -> str:
        """All of it, in lines of at most ``width`` characters."""
        saved = ["", saved_table(self.saved)] if self.saved else []
        if width >= WIDTH:
            return "\n".join([self.title(), self.table(width=width), *self.summary(), *saved])
        lines = [line for text in self.summary() for line in wrap(text, width, subsequent_indent=" " * 10)]
        title = wrap(self.title(), width, subsequent_indent=" " * 10)
        return "\n".join([*title, self.table(width=max(width, 60)), *lines, *saved])

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        return f"<Report: {len(self.lowered)} of {len(self.records)} matmuls lowered>"

    def __sub__(self, before: Report) -> Difference:
        """What changed from another report to this one."""
        return Difference(before, self) if isinstance(before, Report) else NotImplemented

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """A report from what :meth:`to_dict` made of it. Raises KeyError or TypeError for anything else."""
        return cls([MatmulRecord.from_dict(row) for row in data["matmuls"]], data["saved_bytes_total"],
                   torch_version=data["torch"], device=data["device"], policy=data["policy"], notes=data["notes"],
                   saved=[SavedRecord.from_dict(row) for row in data.get("saved", ())],
                   memory=[MemoryRecord.from_dict(row) for row in data.get("memory", ())],
                   predicted=data.get("predicted_speed"))

    def to_dict(self) -> dict[str, object]:
        """Everything, uncollapsed, JSON-serialisable."""
        return {
            "torch": self.torch_version, "device": self.device, "policy": self.policy, "notes": list(self.notes),
            "saved_bytes_total": self.saved_bytes_total,
            "lowered": len(self.lowered), "total": len(self.records),
            "flops_share": {**{role: self.flops_share(role) for role in ROLES}, "total": self.flops_share()},
            "predicted_speed": self.predicted, "reasons": self.reasons,
            "matmuls": [r.as_dict() for r in self.records],
            **({"saved": [r.as_dict() for r in self.saved]} if self.saved else {}),
            **({"memory": [r.as_dict() for r in self.memory]} if self.memory else {}),
        }

    def plot_frontier(self, path: str | os.PathLike[str]) -> None:
        """Draw the predicted time against what is kept, all that could have been chosen for the option ``memory``.

        Raises ValueError where nothing was chosen, ImportError without matplotlib.
        """
        frontiers.plot(self.memory, path)

    def to_html(self) -> str:
        """One self-contained page, light or dark as the reader prefers."""
        return content.explain_page(self)

    def _repr_html_(self) -> str:
        return content.fragment(self)
