"""What the page of a report shows: the summary first, then one row a group of equal layers that unfolds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quartet.lowering.recipe.types import ROLES
from quartet.report import pages
from quartet.report.rows import HEADER, RIGHT, Row, rows, saved_table
from quartet.report.text import human_bytes, percent

COLORS = 8
SHOWN = 500  # names of one group


def explain_page(report: Any) -> str:
    """The page of a ``quartet.report.table.Report``."""
    return pages.render("explain.html", title="quartet explain", **data_of(report))


def fragment(report: Any) -> str:
    """The same without a page around it, for a notebook."""
    inner = pages.render("report.html", **data_of(report))
    style = (pages.FOLDER / "style.css").read_text(encoding="utf-8")
    return f'<style>{style}</style><div class="quartet">{inner}</div>'


def data_of(report: Any) -> dict[str, Any]:
    """What the templates of a report need."""
    recipes = list(dict.fromkeys(r.recipe for r in report if r.recipe is not None and r.lowered))
    color = {name: i % COLORS for i, name in enumerate(recipes)}
    saved = ["", saved_table(report.saved)] if report.saved else []
    return {
        "subtitle": report.title().removeprefix("quartet · "), "graphs": report.graphs, "cards": _cards(report),
        "alone": _alone(report), "header": HEADER, "right": RIGHT, "roles": ROLES,
        "recipes": [{"name": name, "color": color[name]} for name in recipes],
        "rows": [_row(row, color) for row in rows(report.records)],
        "summary": "\n".join([*report.summary(), *saved]),
    }


def _row(row: Row, color: dict[str, int]) -> dict[str, Any]:
    r, cells = row.record, row.cells()
    sort: dict[int, Any] = {2: ROLES.index(r.role), 3: row.count, 4: r.flops or 0, 8: r.saved_bytes or 0}
    more = len(row.members) - SHOWN
    return {
        "name": cells[0], "role": r.role, "state": "lowered" if r.lowered else "alone", "recipe": r.recipe or "",
        "members": [] if row.count == 1 else [*row.members[:SHOWN], *([f"and {more} more"] if more > 0 else [])],
        "remarks": "; ".join(row.remarks),
        "cells": [{"text": text, "right": i in (3, 8), "sort": sort.get(i),
                   "color": (color.get(r.recipe or "", "none") if r.lowered else "none") if i == 6 else None}
                  for i, text in enumerate(cells) if i > 0],
    }


def _cards(report: Any) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = [
        {"value": f"{len(report.lowered)} of {len(report)}", "label": "matmuls quantised", "share": None}]
    for role in (None, *ROLES):
        share = report.flops_share(role)
        if share is not None:
            made.append({"value": percent(share), "label": f"of the FLOPs{f' of {role}' if role else ''}",
                         "share": share})
    made.append({"value": human_bytes(report.saved_bytes_total), "label": "kept for backward", "share": None})
    if report.predicted is not None:
        made.append({"value": f"{report.predicted:.2f}×", "label": "predicted speed of the linear layers",
                     "share": None})
    return made


def _alone(report: Any) -> list[dict[str, Any]]:
    """Why matmuls are left alone, the most FLOPs first."""
    total = sum(r.flops or 0 for r in report)
    groups: dict[str, list[int]] = {}
    for r in report.left_alone:
        groups.setdefault(r.reason or "no reason recorded", []).append(r.flops or 0)
    ordered: Sequence[tuple[str, list[int]]] = sorted(groups.items(), key=lambda item: -sum(item[1]))
    return [{"reason": reason, "count": len(flops), "share": percent(sum(flops) / total if total else None)}
            for reason, flops in ordered]
