"""What changed from one report to another: which matmuls run otherwise, and what that does to the totals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from quartet.lowering.recipe.records import MatmulRecord
from quartet.report.text import INDEX, human_bytes, percent


@dataclass(frozen=True)
class Change:
    """One matmul before and after; None where there is none."""

    before: MatmulRecord | None
    after: MatmulRecord | None

    @property
    def record(self) -> MatmulRecord:
        """Whichever there is, the later first."""
        found = self.after or self.before
        assert found is not None
        return found

    def said(self) -> tuple[str, str]:
        """How it ran and how it runs, in words, with what differs."""
        ran, runs = _said(self.before), _said(self.after)
        if ran == runs and self.before is not None and self.after is not None:
            sizes = [f"{r.m} × {r.n} × {r.k} × {r.batch} {r.dtype} {r.op_class}" for r in (self.before, self.after)]
            kept = [f"keeps {human_bytes(r.saved_bytes)}" for r in (self.before, self.after)]
            reasons = [r.reason for r in (self.before, self.after)]
            for a, b in (sizes, kept, reasons):
                if a != b:
                    return f"{ran}, {a}", f"{runs}, {b}"
        return ran, runs


class Difference:
    """What changed between two reports. False where nothing did; iterates over the :class:`Change` of each matmul.

    Args:
        before, after: each a ``quartet.report.table.Report``.
    """

    def __init__(self, before: Any, after: Any) -> None:
        self.before, self.after = before, after
        ran, runs = _by_name(before), _by_name(after)
        both = {key: Change(ran.get(key), runs.get(key)) for key in {**runs, **ran}}
        self.changes = tuple(change for change in both.values() if not _same(change))

    def __iter__(self) -> Iterator[Change]:
        return iter(self.changes)

    def __len__(self) -> int:
        return len(self.changes)

    def totals(self) -> dict[str, tuple[object, object]]:
        """What is true of the whole model, where it differs: before and after."""
        both = {what: (of(self.before), of(self.after)) for what, of in (
            ("policy", lambda r: r.policy), ("device", lambda r: r.device), ("torch", lambda r: r.torch_version),
            ("lowered", lambda r: f"{len(r.lowered)} of {len(r)}"),
            ("FLOPs", lambda r: percent(r.flops_share())), ("kept", lambda r: human_bytes(r.saved_bytes_total)))}
        return {what: pair for what, pair in both.items() if pair[0] != pair[1]}

    def __str__(self) -> str:
        if not self and not self.totals():
            return "nothing changed"
        lines = [f"{what:<10}{a} → {b}" for what, (a, b) in self.totals().items()]
        groups: dict[tuple[str, str, str, str], list[str]] = {}
        for change in self.changes:
            r = change.record
            groups.setdefault((INDEX.sub("*", r.fqn) or "(no module)", r.role, *change.said()), []).append(r.fqn)
        for (name, role, ran, runs), members in groups.items():
            shown = members[0] if len(members) == 1 and members[0] else name
            lines.append(f"{shown} {role}{f' × {len(members)}' if len(members) > 1 else ''}: {ran} → {runs}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Difference: {len(self)} matmuls>"

    def to_dict(self) -> dict[str, object]:
        """Totals and changes, JSON-serialisable."""
        return {"totals": {what: list(pair) for what, pair in self.totals().items()},
                "changes": [{"fqn": c.record.fqn, "role": c.record.role,
                             "before": None if c.before is None else c.before.as_dict(),
                             "after": None if c.after is None else c.after.as_dict()} for c in self.changes]}


def _by_name(report: Any) -> dict[tuple[str, str, int], MatmulRecord]:
    """Records by module and role; several of one module in their order."""
    found: dict[tuple[str, str, int], MatmulRecord] = {}
    counts: dict[tuple[str, str], int] = {}
    for r in report:
        nth = counts[r.fqn, r.role] = counts.get((r.fqn, r.role), -1) + 1
        found[r.fqn, r.role, nth] = r
    return found


def _same(change: Change) -> bool:
    pair = [None if r is None else {k: v for k, v in r.as_dict().items() if k not in ("site", "notes")}
            for r in (change.before, change.after)]
    return pair[0] == pair[1]


def _said(record: MatmulRecord | None) -> str:
    if record is None:
        return "not there"
    return f"{record.recipe} by {record.kernel}" if record.lowered else f"left alone ({record.reason or 'no reason'})"
