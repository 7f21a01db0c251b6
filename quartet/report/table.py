"""The table "matmul → kernel, or why not", as text and data."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from textwrap import wrap
from typing import Any

import torch

from quartet.lowering.recipe.records import MatmulRecord, MemoryRecord, SavedRecord
from quartet.lowering.recipe.types import ROLES
from quartet.report import html
from quartet.report import memory as frontiers
from quartet.report.difference import Difference
from quartet.report.text import INDEX, human_bytes, percent, shorten

WIDTH = 140
LEFT_ALONE = "left alone"
SMALL = 1 << 13  # bytes of a tensor that gets no line of its own
HEADER = ("matmul", "class", "role", "×", "m × n × k", "dtype", "recipe", "kernel", "kept", "remarks")
FAIR = (34, 6, 5, 4, 14, 5, 7, 12, 10, 4)
LEAST = (8, 6, 5, 2, 10, 5, 6, 7, 8, 3)
RIGHT = ("×", "kept")
DISPENSABLE = ("dtype", "class", "×")


def _ranges(values: Iterable[int]) -> str:
    """``[0, 1, 2, 5]`` as ``"{0..2,5}"``, a single value as itself."""
    ordered = sorted(values)
    if len(ordered) == 1:
        return str(ordered[0])
    runs: list[list[int]] = []
    for v in ordered:
        if runs and v == runs[-1][1] + 1:
            runs[-1][1] = v
        else:
            runs.append([v, v])
    return "{" + ",".join(f"{a}" if a == b else f"{a}..{b}" if b > a + 1 else f"{a},{b}" for a, b in runs) + "}"


def _boxes(indices: set[tuple[int, ...]]) -> list[tuple[tuple[int, ...], ...]]:
    """A set of index tuples as disjoint products of sets, one tuple of sets a product."""
    if indices == {()}:
        return [()]
    rest_of: dict[int, set[tuple[int, ...]]] = {}
    for first, *rest in sorted(indices):
        rest_of.setdefault(first, set()).add(tuple(rest))
    firsts: dict[frozenset[tuple[int, ...]], list[int]] = {}
    for first, rests in rest_of.items():
        firsts.setdefault(frozenset(rests), []).append(first)
    return [(tuple(values), *box) for rests, values in firsts.items() for box in _boxes(set(rests))]


@dataclass(frozen=True)
class Row:
    """Matmuls that differ in nothing but the numbers in their names."""

    name: str
    record: MatmulRecord
    members: tuple[str, ...]

    @property
    def count(self) -> int:
        """How many they are."""
        return len(self.members)

    def place(self) -> tuple[int, int]:
        """Where the row stands: by site, then fprop, dgrad, wgrad."""
        return self.record.site, ROLES.index(self.record.role)

    @property
    def remarks(self) -> tuple[str, ...]:
        """The reason, if any, then the notes."""
        return remarks(self.record)

    def cells(self) -> tuple[str, ...]:
        """The columns of ``HEADER`` but the last, unshortened."""
        r = self.record
        size = f"{r.m} × {r.n} × {r.k}" + ("" if r.batch == 1 else f" ({r.batch} of them)")
        return (self.name, r.op_class, r.role, str(self.count) if self.count > 1 else "", size,
                r.dtype.removeprefix("torch."), r.recipe or "–", r.kernel or LEFT_ALONE, human_bytes(r.saved_bytes))


def remarks(record: MatmulRecord) -> tuple[str, ...]:
    """What there is to say about a matmul: why it was left alone, then its notes."""
    reason = record.reason or ("" if record.lowered else "no reason recorded")
    return tuple(filter(None, (reason, *record.notes)))


def rows(records: Sequence[MatmulRecord], collapse: bool = True) -> list[Row]:
    """One row a matmul; with ``collapse``, ``layers.{0..7}.q_proj`` where every other column is equal."""
    if not collapse:
        return sorted((Row(r.fqn or f"matmul {r.site}", r, (r.fqn,)) for r in records), key=Row.place)
    groups: dict[tuple[str, MatmulRecord], list[MatmulRecord]] = {}
    for r in records:
        groups.setdefault((INDEX.sub("#", r.fqn), replace(r, site=0, fqn="")), []).append(r)
    out = []
    for (template, _), members in groups.items():
        by_index: dict[tuple[int, ...], list[MatmulRecord]] = {}
        for r in members:
            by_index.setdefault(tuple(int(i) for i in INDEX.findall(r.fqn)), []).append(r)
        for box in _boxes(set(by_index)):
            name = template
            for slot in box:
                name = name.replace("#", _ranges(slot), 1)
            inside = [r for index, rs in by_index.items() if all(i in s for i, s in zip(index, box, strict=True))
                      for r in rs]
            out.append(Row(name or (f"matmul {inside[0].site}" if len(inside) == 1 else "(no module)"),
                           inside[0], tuple(r.fqn for r in inside)))
    return sorted(out, key=Row.place)


def saved_table(records: Sequence[SavedRecord]) -> str:
    """What forward keeps for backward, largest first: a line for all that differ in the numbers of their names only,
    one for everything beside activations, and the reasons below."""
    groups: dict[SavedRecord, list[str]] = {}
    for r in records:
        blank = replace(r, name="", fqn=INDEX.sub("#", r.fqn))
        if r.saved is None and (not r.dtype.endswith(("float16", "float32")) or r.bytes < SMALL):
            blank = replace(blank, fqn="(small, or no activation)", op="", shape=(), dtype="", bytes=0, saved_bytes=0,
                            reason="codes, scales, masks, indices, statistics and small tensors stay as they are")
        groups.setdefault(blank, []).append(r.fqn)
    aside = sum(r.bytes for r in records) - sum(g.bytes * len(names) for g, names in groups.items())
    rows, reasons = [], list(dict.fromkeys(g.reason for g in groups))
    for g, names in sorted(groups.items(), key=lambda item: -item[0].bytes * len(item[1])):
        fqn = g.fqn
        for slot in zip(*{tuple(int(i) for i in INDEX.findall(name)) for name in names if "#" in fqn}, strict=True):
            fqn = fqn.replace("#", _ranges(set(slot)), 1)
        before, after = (human_bytes(n * len(names) if g.shape else aside) for n in (g.bytes, g.saved_bytes))
        time = frontiers.seconds(g.seconds * len(names)) if g.seconds else ""
        rows.append((fqn or "(no module)", g.op, str(len(names)) if len(names) > 1 else "", "×".join(map(str, g.shape)),
                     g.dtype.removeprefix("torch."), before, g.saved or "exact", after, time,
                     f"[{reasons.index(g.reason) + 1}]"))
    head = ("saved by", "op", "×", "shape", "dtype", "before", "kept as", "after", "time", "why")
    widths = [min(max(map(len, column)), 32) for column in zip(head, *rows, strict=True)]
    lines = ["  ".join(shorten(c, w).rjust(w) if h in ("×", "before", "after", "time") else shorten(c, w).ljust(w)
                       for h, c, w in zip(head, row, widths, strict=True)).rstrip() for row in (head, *rows)]
    return "\n".join([*lines, *(f"{f'[{i}]':<9} {reason}" for i, reason in enumerate(reasons, 1))])


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
        return html.explain_page(self)

    def _repr_html_(self) -> str:
        return html.fragment(self)
