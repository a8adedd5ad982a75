"""The report as one HTML page, written together with its Markdown."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from distill.app.console import visible
from distill.app.files import Json, atomic_write
from distill.reports.arms import cell
from distill.reports.charts import charts, confidence, effects, fronts, unbeaten
from distill.reports.conclusion import conclude, tone
from distill.reports.costs import cost, total_spread, yields
from distill.reports.judgements import JUDGEMENT_TITLES, judged, verdicts_on_judges
from distill.reports.rows import rows_table
from distill.reports.runs import flatten, mapping, mappings, number, read_runs
from distill.reports.samples import outcomes, reasoning
from distill.reports.selective import selective
from distill.reports.sentences import contamination_lines, cost_note, notes, of_results, yield_lines
from distill.reports.steps import pairs_note, steps_to_equal
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
    short,
    steps_row,
    unit,
)
from distill.reports.text import MAX_SENTENCE, to_markdown
from distill.reports.verdicts import TO_RUN, Summary, summarise

HASH = re.compile(r"\b([0-9a-f]{8})[0-9a-f]{24,56}\b")  # an id that nobody reads to its end


class Uncut(str):
    """A sentence of the report that the page does not cut to 500 characters."""

    __slots__ = ()


def to_html(summary: Summary, prices: Json = NO_PRICES) -> str:
    """Render one page that needs no network; text is escaped and made visible, and cut except for verdicts."""
    content = _tables(summary, prices) | _charts(summary, prices) | _samples(summary)
    return _template().render(summary=summary, **content)


@functools.cache
def _template() -> jinja2.Template:
    """The page, compiled once."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    pages = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    pages.trim_blocks = pages.lstrip_blocks = True
    pages.finalize = lambda value: HASH.sub(r"\1…", visible(value)) if type(value) is str else value
    functions = (cell, class_rows, class_titles, flatten, mapping, mappings, number, short, tone, uncut, unit)
    pages.globals.update({function.__name__: function for function in functions}, math=math)
    return pages.get_template("report.html.j2")


def uncut(text: str) -> Uncut:
    """Make a sentence of the report visible without cutting it to 500 characters."""
    return Uncut(visible(text, MAX_SENTENCE))


def _tables(summary: Summary, prices: Json) -> dict[str, Any]:
    costs = [cost(arm, prices) for arm in summary.trained]
    shown, found, judgements = columns(summary), confusions(summary), judged(summary.trained)
    return {
        "difference_titles": difference_titles(summary),
        "difference_rows": [difference_row(verdict) for verdict in summary.verdicts if verdict.difference],
        "contrast_titles": contrast_titles(summary),
        "contrast_rows": [contrast_row(contrast) for contrast in summary.contrasts],
        "steps_titles": STEPS_TITLES,
        "steps_notes": pairs_note(summary.trained),
        "steps_rows": list(map(steps_row, steps_to_equal(summary.trained))),
        "judgement_titles": JUDGEMENT_TITLES,
        "judgement_rows": [line.cells for line in judgements],
        "judges": verdicts_on_judges(judgements),
        "columns": shown,
        "guess_rows": guess_rows(summary, len(shown)),
        "confusions": found,
        "recall_titles": recall_titles(found),
        "recall_rows": [recall_row(table, recall_titles(found)[1:]) for table in found],
        "selective_titles": SELECTIVE_TITLES,
        "selective_rows": list(map(selective_row, selective(summary.arms))),
        "rows_table": rows_table(summary.runs),
        "conclusion": conclude(summary),
        "notes": notes(summary),
        "of_results": of_results(summary),
        "to_run": TO_RUN,
        "seed_columns": seed_columns(summary),
        "cost_titles": COST_TITLES,
        "cost_rows": [cost_row(arm_cost) for arm_cost in costs],
        "cost_note": cost_note(costs),
    }


def _charts(summary: Summary, prices: Json) -> dict[str, Any]:
    units = dict.fromkeys(cost(arm, prices).unit for arm in summary.trained)
    totals = [total_spread(arm, prices) if arm.runs else None for arm in summary.arms]
    return {
        "confidence": confidence(summary.trained),
        "charts": charts(summary.trained),
        "fronts": fronts(summary.arms, totals, " and ".join(units)),
        "unbeaten": unbeaten(summary.arms, totals),
        "effects": effects(summary.trained),
    }


def _samples(summary: Summary) -> dict[str, Any]:
    run, groups = outcomes(summary)
    filters, rationales = reasoning(summary)
    data = {"yields": yield_lines(yields(summary.trained)), "contamination": contamination_lines(summary.runs)}
    return {"sampled": run, "outcomes": groups, "filters": filters, "rationales": rationales} | data


def write_report(
    run_dirs: Sequence[str | Path], out_dir: str | Path, *, level: float = 0.95, prices: Json = NO_PRICES
) -> Summary:
    """Write report.html and report.md, each atomically; raises ConfigError that lists every folder without a run.

    `level` applies to all verdicts together; prices in `prices` override those of the runs.
    """
    summary = summarise(read_runs(run_dirs), level)
    for name, text in (("report.html", to_html(summary, prices)), ("report.md", to_markdown(summary, prices))):
        with atomic_write(Path(out_dir) / name) as part:
            part.write_text(text, encoding="utf-8")
    return summary
