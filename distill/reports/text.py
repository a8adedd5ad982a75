"""The report as text, for a terminal and as Markdown."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from itertools import zip_longest

from distill.app.console import visible
from distill.app.files import Json
from distill.reports.arms import COLUMNS, cell, judged_columns
from distill.reports.conclusion import conclude
from distill.reports.costs import cost
from distill.reports.judgements import JUDGEMENT_TITLES, Judged, judged, verdicts_on_judges
from distill.reports.rows import rows_table
from distill.reports.selective import selective
from distill.reports.sentences import facts, remarks
from distill.reports.steps import steps_to_equal
from distill.reports.tables import (
    COST_TITLES,
    NO_PRICES,
    SELECTIVE_TITLES,
    STEPS_TITLES,
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
    seed_columns,
    selective_row,
    steps_row,
)
from distill.reports.verdicts import TO_RUN, Summary

TEXT_WIDTH = 110
MAX_SENTENCE = 1500  # characters
_LABEL_WIDTH = 20  # least width of the first column of a table that is split
_CELL_WIDTH = 40  # largest width of any other column
_TITLE_WIDTH = 18  # a longer title is wrapped unless its cells are as long


def to_text(summary: Summary, prices: Json = NO_PRICES, *, width: int = TEXT_WIDTH) -> str:
    """Format the conclusion, tables and verdicts for a terminal of `width` columns; only a command may be longer."""
    width = max(_LABEL_WIDTH + _CELL_WIDTH, min(width, TEXT_WIDTH))
    shown = judged_columns(summary.arms, COLUMNS)
    results = [[arm.label, *(cell(arm, column, is_narrow=True) for column in shown)] for arm in summary.arms]
    results += guess_rows(summary, len(shown), is_narrow=True)
    differences = [difference_row(verdict) for verdict in summary.verdicts if verdict.difference]
    contrasts = [contrast_row(contrast) for contrast in summary.contrasts]
    costs = [cost_row(cost(arm, prices)) for arm in summary.trained]
    costs = [[row[0], *(text.replace("not measured", "-") for text in row[1:])] for row in costs]
    confusion_tables = confusions(summary)
    recalls = recall_titles(confusion_tables)
    conclusion, judgements = conclude(summary), judged(summary.trained)
    parts = (
        [_filled(" ".join((conclusion.headline, *conclusion.sentences)), width)],
        _aligned(["model", *(column.short for column in shown)], results, width),
        _aligned(difference_titles(summary), differences, width),
        _aligned(contrast_titles(summary), contrasts, width),
        _aligned(STEPS_TITLES, list(map(steps_row, steps_to_equal(summary.trained))), width),
        _aligned(JUDGEMENT_TITLES, [line.cells for line in judgements], width),
        [_filled(text, width) for text in verdicts_on_judges(judgements)],
        _aligned(recalls, [recall_row(table, recalls[1:]) for table in confusion_tables], width),
        _aligned(SELECTIVE_TITLES, list(map(selective_row, selective(summary.arms))), width),
        [_filled(text, width) for text in remarks(summary)],
        _aligned(COST_TITLES, costs, width),
        [_filled(text, width) for text in facts(summary, prices)],
    )
    return "\n".join(line for part in parts if part for line in (*part, ""))


def judgements_text(lines: Sequence[Judged], *, width: int) -> str:
    """Format judgements for a terminal."""
    table = _aligned(JUDGEMENT_TITLES, [line.cells for line in lines], width)
    return "\n".join([*table, "", *(_filled(text, width) for text in verdicts_on_judges(lines))])


def _filled(text: str, width: int) -> str:
    """Wrap a sentence; a command after it stays on one line, so that it can be copied."""
    sentence, _, command = visible(text, MAX_SENTENCE).partition(TO_RUN)
    return "\n".join(filter(None, (textwrap.fill(sentence, width), command and f"{TO_RUN}\n{command}")))


def _aligned(titles: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Align columns right, with every title and cell wrapped; no rows, no lines.

    Columns that do not fit beside the labels follow in a further table with the same labels.
    """
    if not rows:
        return []
    labels, *columns = zip(*([visible(text) for text in row] for row in (titles, *rows)), strict=True)
    widths = [_width(column) for column in columns]
    lines: list[str] = []
    for part in _parts(widths, width - _LABEL_WIDTH):
        shown = [widths[index] for index in part]
        room = min(max(map(len, labels)), width - sum(shown) - 2 * len(shown))
        for texts in zip(labels, *(columns[index] for index in part), strict=True):
            lines += _wrapped(texts, [room, *shown])
        lines.append("")
    return lines[:-1]


def _width(column: Sequence[str]) -> int:
    title, *cells = map(len, column)
    return min(_CELL_WIDTH, max(min(_TITLE_WIDTH, title), *cells))


def _parts(widths: Sequence[int], room: int) -> list[list[int]]:
    """Distribute columns over tables: each takes as many of the next columns as fit."""
    parts: list[list[int]] = [[]]
    for index, width in enumerate(widths):
        if parts[-1] and sum(widths[i] + 2 for i in parts[-1]) + width + 2 > room:
            parts.append([])
        parts[-1].append(index)
    return parts


def _wrapped(texts: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    """Yield the lines of a row: the first column is aligned left, the others right."""
    columns = [textwrap.wrap(text, width) or [""] for text, width in zip(texts, widths, strict=True)]
    for label, *cells in zip_longest(*columns, fillvalue=""):
        aligned = (text.rjust(width) for text, width in zip(cells, widths[1:], strict=True))
        yield "  ".join((label.ljust(widths[0]), *aligned)).rstrip()


def to_markdown(summary: Summary, prices: Json = NO_PRICES) -> str:
    """Format the verdicts and tables as GitHub Markdown."""
    conclusion = conclude(summary)
    lines = ["# Distillation report", "", f"**{_plain(conclusion.headline)}**"]
    lines += ["", _uncut(" ".join(conclusion.sentences)), "", *(f"- {_uncut(text)}" for text in remarks(summary))]
    rows = [[_plain(text) for text in difference_row(verdict)] for verdict in summary.verdicts if verdict.difference]
    lines += ["", "## Differences", "", *_grid(difference_titles(summary), rows)] if rows else []
    rows = [[_plain(text) for text in contrast_row(contrast)] for contrast in summary.contrasts]
    lines += ["", "## One setting changed", "", *_grid(contrast_titles(summary), rows)] if rows else []
    rows = [list(map(_plain, steps_row(pair))) for pair in steps_to_equal(summary.trained)]
    lines += ["", "## Steps to equal", "", *_grid(STEPS_TITLES, rows)] if rows else []
    judgements = judged(summary.trained)
    rows = [list(map(_plain, line.cells)) for line in judgements]
    lines += ["", "## Judgements", "", *_grid(JUDGEMENT_TITLES, rows), ""] if rows else []
    lines += [f"- {_plain(sentence)}" for sentence in verdicts_on_judges(judgements)]
    parts = (("Results", summary.arms, columns(summary)), ("Each seed", summary.seeds, seed_columns(summary)))
    for heading, arms, shown in parts:
        rows = [[_plain(arm.label), *(cell(arm, column) for column in shown)] for arm in arms]
        rows += [list(map(_plain, row)) for row in guess_rows(summary, len(shown)) if arms is summary.arms]
        lines += ["", f"## {heading}", "", *_grid(["model", *(column.title for column in shown)], rows)]
    for table in confusions(summary):
        lines += ["", f"## Answers by class: {_plain(table.arm.label)}", ""]
        lines += _grid(*_plain_grid(class_titles(table), class_rows(table)))
    rows = [list(map(_plain, selective_row(model))) for model in selective(summary.arms)]
    lines += ["", "## Accuracy by share answered", "", *_grid(SELECTIVE_TITLES, rows)] if rows else []
    titles, rows = rows_table(summary.runs)
    lines += ["", "## Rows", "", *_grid(*_plain_grid(titles, rows))] if rows else []
    rows = [[_plain(text) for text in cost_row(cost(arm, prices))] for arm in summary.trained]
    lines += ["", "## Cost and data", "", *_grid(COST_TITLES, rows), ""]
    return "\n".join([*lines, *(f"- {_uncut(text)}" for text in facts(summary, prices)), ""])


def _grid(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *rows)]


def _plain_grid(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    return list(map(_plain, titles)), [list(map(_plain, row)) for row in rows]


def _plain(text: str) -> str:
    return _escaped(visible(text))


def _uncut(text: str) -> str:
    """A sentence of the report, which is longer than any text from a file may be."""
    return _escaped(visible(text, MAX_SENTENCE))


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>|#~$&])", r"\\\1", text.replace("\n", " "))
