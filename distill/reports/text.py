"""The report as text, for a terminal and as Markdown."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

from distill.app.console import visible
from distill.app.files import Json
from distill.reports.arms import COLUMNS, SEED_COLUMNS, cell
from distill.reports.costs import cost
from distill.reports.sentences import facts, remarks
from distill.reports.tables import (
    COST_TITLES,
    NO_PRICES,
    columns,
    contrast_row,
    contrast_titles,
    cost_row,
    difference_row,
    difference_titles,
)
from distill.reports.verdicts import Summary

TEXT_WIDTH = 110
MAX_SENTENCE = 1500  # characters


def to_text(summary: Summary, prices: Json = NO_PRICES) -> str:
    """Format the verdicts and tables for a terminal, at most 110 columns wide."""
    results = [[arm.label, *(cell(arm, column, is_narrow=True) for column in COLUMNS)] for arm in summary.arms]
    differences = [difference_row(verdict) for verdict in summary.verdicts if verdict.difference]
    contrasts = [contrast_row(contrast) for contrast in summary.contrasts]
    costs = [cost_row(cost(arm, prices)) for arm in summary.trained]
    parts = (
        _aligned(["model", *(column.short for column in COLUMNS)], results),
        _aligned(difference_titles(summary), differences),
        _aligned(contrast_titles(summary), contrasts),
        [textwrap.fill(visible(text, MAX_SENTENCE), TEXT_WIDTH) for text in remarks(summary)],
        _aligned(COST_TITLES, [[row[0], *(text.replace("not measured", "-") for text in row[1:])] for row in costs]),
        [textwrap.fill(visible(text), TEXT_WIDTH) for text in facts(summary, prices)],
    )
    return "\n".join(line for part in parts if part for line in (*part, ""))


def _aligned(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Align columns right, and wrap the first column to the remaining width; no rows, no lines."""
    if not rows:
        return []
    lines = [titles[1:], *([visible(text, 60) for text in row[1:]] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    room = max(12, TEXT_WIDTH - sum(widths) - 2 * len(widths))
    table = []
    for label, cells in zip([titles[0], *(visible(row[0]) for row in rows)], lines, strict=True):
        first, *rest = textwrap.wrap(label, room) or [""]
        table += [f"{first:{room}}  " + "  ".join(t.rjust(w) for t, w in zip(cells, widths, strict=True)), *rest]
    return table


def to_markdown(summary: Summary, prices: Json = NO_PRICES) -> str:
    """Format the verdicts and tables as GitHub Markdown."""
    lines = ["# Distillation report", "", *(f"- {_plain(text)}" for text in remarks(summary))]
    rows = [[_plain(text) for text in difference_row(verdict)] for verdict in summary.verdicts if verdict.difference]
    lines += ["", "## Differences", "", *_grid(difference_titles(summary), rows)] if rows else []
    rows = [[_plain(text) for text in contrast_row(contrast)] for contrast in summary.contrasts]
    lines += ["", "## One setting changed", "", *_grid(contrast_titles(summary), rows)] if rows else []
    parts = (("Results", summary.arms, columns(summary)), ("Each seed", summary.seeds, SEED_COLUMNS))
    for heading, arms, shown in parts:
        rows = [[_plain(arm.label), *(cell(arm, column) for column in shown)] for arm in arms]
        lines += ["", f"## {heading}", "", *_grid(["model", *(column.title for column in shown)], rows)]
    rows = [[_plain(text) for text in cost_row(cost(arm, prices))] for arm in summary.trained]
    lines += ["", "## Cost and data", "", *_grid(COST_TITLES, rows), ""]
    return "\n".join([*lines, *(f"- {_plain(text)}" for text in facts(summary, prices)), ""])


def _grid(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *rows)]


def _plain(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>|#~$&])", r"\\\1", visible(text).replace("\n", " "))
