"""The report as text: for a terminal, and as Markdown."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

from distill.app.console import visible
from distill.reports.arms import COLUMNS, SEED_COLUMNS, cell
from distill.reports.costs import cost
from distill.reports.runs import Json
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
MOST_OF_A_SENTENCE = 1500  # characters


def to_text(summary: Summary, given: Json = NO_PRICES) -> str:
    """The verdicts and the tables for a terminal, at most 110 columns wide."""
    lines = [[cell(arm, column, is_narrow=True) for column in COLUMNS] for arm in summary.arms]
    table = _aligned(["model", *(column.short for column in COLUMNS)], [arm.label for arm in summary.arms], lines)
    rows = [difference_row(verdict) for verdict in summary.verdicts if verdict.difference]
    apart = _aligned(difference_titles(summary), [row[0] for row in rows], [row[1:] for row in rows]) if rows else []
    rows = [contrast_row(contrast) for contrast in summary.contrasts]
    apart += (
        ["", *_aligned(contrast_titles(summary), [row[0] for row in rows], [row[1:] for row in rows])] if rows else []
    )
    said = [textwrap.fill(visible(text, MOST_OF_A_SENTENCE), TEXT_WIDTH) for text in remarks(summary)]
    rows = [cost_row(cost(arm, given)) for arm in summary.trained]
    narrow = [[text.replace("not measured", "-") for text in row[1:]] for row in rows]
    spent = _aligned(COST_TITLES, [row[0] for row in rows], narrow) if rows else []
    known = [textwrap.fill(visible(text), TEXT_WIDTH) for text in facts(summary, given)]
    parts = (table, apart, said, spent, known)
    return "\n".join(line for part in parts if part for line in (*part, ""))


def _aligned(titles: Sequence[str], labels: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """Columns set flush right, the labels wrapped into what is left of the width."""
    lines = [titles[1:], *([visible(text, 60) for text in cells] for cells in lines)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    room = max(12, TEXT_WIDTH - sum(widths) - 2 * len(widths))
    table = []
    for label, cells in zip([titles[0], *map(visible, labels)], lines, strict=True):
        first, *rest = textwrap.wrap(label, room) or [""]
        table += [f"{first:{room}}  " + "  ".join(t.rjust(w) for t, w in zip(cells, widths, strict=True)), *rest]
    return table


def to_markdown(summary: Summary, given: Json = NO_PRICES) -> str:
    """The verdicts and the tables as GitHub Markdown."""
    lines = ["# Distillation report", "", *(f"- {_plain(text)}" for text in remarks(summary))]
    rows = [[_plain(text) for text in difference_row(verdict)] for verdict in summary.verdicts if verdict.difference]
    lines += ["", "## Differences", "", *_grid(difference_titles(summary), rows)] if rows else []
    rows = [[_plain(text) for text in contrast_row(contrast)] for contrast in summary.contrasts]
    lines += ["", "## One choice apart", "", *_grid(contrast_titles(summary), rows)] if rows else []
    parts = (("Results", summary.arms, columns(summary)), ("Each seed", summary.seeds, SEED_COLUMNS))
    for heading, arms, kept in parts:
        rows = [[_plain(arm.label), *(cell(arm, column) for column in kept)] for arm in arms]
        lines += ["", f"## {heading}", "", *_grid(["model", *(column.title for column in kept)], rows)]
    rows = [[_plain(text) for text in cost_row(cost(arm, given))] for arm in summary.trained]
    lines += ["", "## Cost and data", "", *_grid(COST_TITLES, rows), ""]
    return "\n".join([*lines, *(f"- {_plain(text)}" for text in facts(summary, given)), ""])


def _grid(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *rows)]


def _plain(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>|#~$&])", r"\\\1", visible(text).replace("\n", " "))
