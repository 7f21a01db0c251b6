"""The rows of a report: matmuls that differ in the numbers of their names only, and what is kept between the passes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from quartet.lowering.recipe.records import MatmulRecord, SavedRecord
from quartet.lowering.recipe.types import ROLES
from quartet.report import memory as frontiers
from quartet.report.text import INDEX, human_bytes, shorten

LEFT_ALONE = "left alone"
SMALL = 1 << 13  # bytes of a tensor that gets no line of its own
HEADER = ("matmul", "class", "role", "×", "m × n × k", "dtype", "recipe", "kernel", "kept", "remarks")
RIGHT = ("×", "kept")


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
