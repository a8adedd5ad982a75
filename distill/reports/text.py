"""The report as text, for a terminal and as Markdown."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

from distill.app.console import visible
from distill.app.files import Json
from distill.reports.arms import COLUMNS, SEED_COLUMNS, cell
from distill.reports.conclusion import conclude
from distill.reports.costs import cost
from distill.reports.rows import rows_table
from distill.reports.sentences import facts, remarks
from distill.reports.tables import (
    COST_TITLES,
    NO_PRICES,
    class_rows,
    class_titles,
    columns,
    confusions,
    contrast_row,
    contrast_titles,
    cost_row,
    difference_row,
    difference_titles,
    guess_rows,
    recall_row,
    recall_titles,
)
from distill.reports.verdicts import TO_RUN, Summary

TEXT_WIDTH = 110
MAX_SENTENCE = 1500  # characters
MAX_COLUMNS = 6  # of classes on a terminal


def to_text(summary: Summary, prices: Json = NO_PRICES) -> str:
    """Format the conclusion, tables and verdicts for a terminal, at most 110 columns wide but for a command."""
    results = [[arm.label, *(cell(arm, column, is_narrow=True) for column in COLUMNS)] for arm in summary.arms]
    results += guess_rows(summary, len(COLUMNS), is_narrow=True)
    differences = [difference_row(verdict) for verdict in summary.verdicts if verdict.difference]
    contrasts = [contrast_row(contrast) for contrast in summary.contrasts]
    costs = [cost_row(cost(arm, prices)) for arm in summary.trained]
    conclusion = conclude(summary)
    parts = (
        [_filled(" ".join((conclusion.headline, *conclusion.sentences)))],
        _aligned(["model", *(column.short for column in COLUMNS)], results),
        _aligned(difference_titles(summary), differences),
        _aligned(contrast_titles(summary), contrasts),
        _recalls(summary),
        [_filled(text) for text in remarks(summary)],
        _aligned(COST_TITLES, [[row[0], *(text.replace("not measured", "-") for text in row[1:])] for row in costs]),
        [_filled(text) for text in facts(summary, prices)],
    )
    return "\n".join(line for part in parts if part for line in (*part, ""))


def _filled(text: str) -> str:
    """Wrap a sentence; a command after it stays on one line, so that it can be copied."""
    sentence, _, command = visible(text, MAX_SENTENCE).partition(TO_RUN)
    return "\n".join(filter(None, (textwrap.fill(sentence, TEXT_WIDTH), command and f"{TO_RUN}\n{command}")))


def _recalls(summary: Summary) -> list[str]:
    confusion_tables = confusions(summary)
    titles = recall_titles(confusion_tables)[: 1 + MAX_COLUMNS]
    rows = [recall_row(table, titles[1:]) for table in confusion_tables]
    return _aligned([visible(title, 14) for title in titles], rows)


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
    conclusion = conclude(summary)
    lines = ["# Distillation report", "", f"**{_plain(conclusion.headline)}**"]
    lines += ["", _plain(" ".join(conclusion.sentences)), "", *(f"- {_plain(text)}" for text in remarks(summary))]
    rows = [[_plain(text) for text in difference_row(verdict)] for verdict in summary.verdicts if verdict.difference]
    lines += ["", "## Differences", "", *_grid(difference_titles(summary), rows)] if rows else []
    rows = [[_plain(text) for text in contrast_row(contrast)] for contrast in summary.contrasts]
    lines += ["", "## One setting changed", "", *_grid(contrast_titles(summary), rows)] if rows else []
    parts = (("Results", summary.arms, columns(summary)), ("Each seed", summary.seeds, SEED_COLUMNS))
    for heading, arms, shown in parts:
        rows = [[_plain(arm.label), *(cell(arm, column) for column in shown)] for arm in arms]
        rows += [list(map(_plain, row)) for row in guess_rows(summary, len(shown)) if arms is summary.arms]
        lines += ["", f"## {heading}", "", *_grid(["model", *(column.title for column in shown)], rows)]
    for table in confusions(summary):
        lines += ["", f"## Answers by class: {_plain(table.arm.label)}", ""]
        lines += _grid(*_plain_grid(class_titles(table), class_rows(table)))
    titles, rows = rows_table(summary.runs)
    lines += ["", "## Rows", "", *_grid(*_plain_grid(titles, rows))] if rows else []
    rows = [[_plain(text) for text in cost_row(cost(arm, prices))] for arm in summary.trained]
    lines += ["", "## Cost and data", "", *_grid(COST_TITLES, rows), ""]
    return "\n".join([*lines, *(f"- {_plain(text)}" for text in facts(summary, prices)), ""])


def _grid(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *rows)]


def _plain_grid(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    return list(map(_plain, titles)), [list(map(_plain, row)) for row in rows]


def _plain(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>|#~$&])", r"\\\1", visible(text).replace("\n", " "))
