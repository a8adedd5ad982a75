"""Run folders to tables, plots and one HTML page that says whether distillation helped.

run folders -> read_run -> Run -> summarise -> Summary -> to_text | to_markdown | to_html | tables
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from distill.app.console import visible
from distill.app.files import whole_file
from distill.reports.arms import COLUMNS, PEAK, SEED_COLUMNS, Column, cell
from distill.reports.charts import Effect, charts, confidence, effects, fronts, unbeaten
from distill.reports.costs import TIME, Cost, Yield, break_even_text, cost, yields
from distill.reports.runs import Json, Run, find_runs, flatten, mapping, mappings, number, read_run, read_runs
from distill.reports.verdicts import BASELINE_COMMAND, Contrast, Difference, Summary, Verdict, share_text, summarise

__all__ = ["find_runs", "read_run", "summarise", "tables", "to_html", "to_markdown", "to_text", "write_report"]

NUM_SAMPLES, TEXT_WIDTH, NUM_RATIONALES = 8, 110, 12
MOST_OF_A_SENTENCE = 1500  # characters
NOTHING = "No distilled student was evaluated, so there is nothing to judge."
NO_PRICES: Json = {}


class Whole(str):
    """A sentence of the report's own, of which the page leaves nothing out."""

    __slots__ = ()


class Outcome(NamedTuple):
    """Test examples of one kind: how many there are, and those shown."""

    title: str
    num: int
    shown: tuple[Json, ...]


def outcomes(summary: Summary) -> tuple[Run | None, list[Outcome]]:
    """Where student and teacher part and where both fail, in the order of the ids; of the run with most losses."""
    run = _sampled(summary)
    told = sorted(run.predictions if run else (), key=lambda line: str(line.get("id")))
    kinds = (
        ("Student right, teacher wrong", True, False),
        ("Teacher right, student wrong", False, True),
        ("Both wrong", False, False),
    )
    found = []
    for title, student, teacher in kinds:
        lines = [
            line for line in told if line.get("is_correct") is student and line.get("is_teacher_correct") is teacher
        ]
        found.append(Outcome(title, len(lines), tuple(lines[:NUM_SAMPLES])))
    return run, found


def _sampled(summary: Summary) -> Run | None:
    arms = sorted(summary.trained, key=lambda arm: (arm.kind != "distilled", -len(arm.losses)))
    return next((run for arm in arms for run in arm.runs if run.predictions), None)


def reasoning(summary: Summary) -> tuple[list[str], list[tuple[list[str], Json]]]:
    """Rationales to look through: the filters, and each example with the filters that it passes.

    Test examples have the student's rationale beside the teacher's; training examples the teacher's and its fate.
    A filter holds at most a dozen of each kind, in the order of the ids.
    """
    run = _sampled(summary)
    keys = ("teacher_rationale", "student_rationale", "gold_rationale")
    lines = [line for line in (run.predictions if run else ()) if any(line.get(key) for key in keys)]
    tested = [(["right" if line.get("is_correct") is True else "wrong"], line) for line in lines]
    source = next((arm_run for arm_run in (run, *summary.runs) if arm_run and arm_run.rationales), None)
    written = [(_fate(line), _as_prediction(line)) for line in (source.rationales if source else ())]
    shown: list[tuple[list[str], Json]] = []
    room: dict[tuple[str, ...], int] = {}
    for marks, line in sorted([*tested, *written], key=lambda item: str(item[1].get("id"))):
        kind = (*marks, str(line.get("is_training")))
        room[kind] = room.get(kind, 0) + 1
        shown += [(marks, line)] if room[kind] <= NUM_RATIONALES else []
    held = {mark for found, _ in shown for mark in found}
    leading = [mark for mark in ("right", "wrong", "kept") if mark in held]
    return [*leading, *sorted(held - set(leading))], shown


def _fate(line: Json) -> list[str]:
    is_right = line.get("answer") is not None and line.get("answer") == line.get("gold")
    reason = line.get("reason")
    return ["right" if is_right else "wrong", "kept" if reason is None else f"rejected: {reason}"]


def _as_prediction(line: Json) -> Json:
    names = {"answer": "teacher_answer", "rationale": "teacher_rationale", "confidence": "teacher_confidence"}
    return {**line, **{new: line.get(old) for old, new in names.items()}, "is_training": True}


def differences(summary: Summary) -> list[Difference]:
    """Every comparison with labels alone, in the order of the verdicts."""
    return [verdict.difference for verdict in summary.verdicts if verdict.difference]


def difference_row(verdict: Verdict) -> list[str]:
    """The cells of one line of the table of differences."""
    difference, beside = verdict.difference, verdict.beside
    if difference is None:
        return [verdict.arm.label, "-", "-", "-", "-", verdict.status]
    share = share_text(difference) if difference.share or not difference.has_teacher else "none to recover"
    return [verdict.arm.label, *_apart(difference), share, " ".join(_apart(beside)) if beside else "-", verdict.status]


def _apart(difference: Difference) -> tuple[str, str]:
    ends = difference.ends
    return f"{difference.points:+.1f}", f"[{ends[0]:+.1f}, {ends[1]:+.1f}]" if ends else "not paired"


def difference_titles(summary: Summary) -> list[str]:
    """Headings of the table of differences, which name the level."""
    return ["arm", "points", _interval_title(differences(summary)), "recovered", "over hard labels", "verdict"]


def contrast_titles(summary: Summary) -> list[str]:
    """Headings of the table of arms that are one choice apart."""
    return ["one choice apart", "points", _interval_title([each.difference for each in summary.contrasts]), "verdict"]


def contrast_row(contrast: Contrast) -> list[str]:
    """The cells of one line of the table of arms that are one choice apart."""
    difference = contrast.difference
    return [f"{contrast.losses}: {contrast.choice}", *_apart(difference), difference.status]


def _interval_title(found: Sequence[Difference]) -> str:
    levels = {f"{100 * difference.level:.3g} %" for difference in found}
    return f"{'/'.join(sorted(levels)) or '95 %'} interval"


COST_TITLES = (
    "one student",
    "annotate",
    "train",
    "evaluate",
    "making",
    "1000 requests",
    "to teacher",
    "paid back after",
)


def cost_row(part: Cost) -> list[str]:
    """The cells of one line of the table of costs."""
    work = map(duration, (part.annotation_seconds, part.training_seconds, part.evaluation_seconds))
    paid = map(money, (part.making, part.student_per_1000, part.teacher_per_1000))
    return [part.arm.label, *work, *paid, break_even_text(part)]


def cost_note(costs: Sequence[Cost]) -> str:
    """What the costs are counted in, and what they hold."""
    units = " and ".join(dict.fromkeys(part.unit for part in costs))
    why = " because no price of the machine was given (`cost` of the configuration)" if TIME in units else ""
    return (
        f"Costs in {units}{why}. Paid back after: the requests to the student instead of the teacher that save what "
        "annotation, training and evaluation cost; never where they save nothing. Labels alone need no annotation."
    )


def duration(seconds: float | None) -> str:
    """Hours, or what is at least one of minutes and seconds."""
    if seconds is None:
        return "not measured"
    size, unit = next((part for part in COLUMNS[-1].units if seconds >= part[0]), (1.0, " s"))
    return f"{seconds / size:.1f}{unit}"


def money(amount: float | None) -> str:
    """An amount, to three digits where it is small."""
    return "not measured" if amount is None else f"{amount:,.3g}" if amount < 100 else f"{amount:,.0f}"


def short(value: int | float) -> str:
    """A number at an axis: 1600 is 1.6k."""
    size, unit = next((part for part in COLUMNS[5].units if abs(value) >= part[0]), (1.0, ""))
    return f"{value / size:.4g}{unit.strip()}"


def yield_lines(found: Sequence[Yield]) -> list[str]:
    """A sentence for each set of rationales on how many were kept, and why the others were not."""
    lines = []
    for part in found:
        reasons = ", ".join(f"{reason} {num}" for reason, num in sorted(part.rejected.items()))
        total = part.kept + sum(part.rejected.values())
        rest = f"; rejected: {reasons}" if reasons else ""
        lines.append(
            f"Rationales of {', '.join(part.labels)}: {part.kept} of {total} kept ({100 * part.share:.0f} %){rest}."
        )
    return lines


def contamination_lines(runs: Sequence[Run]) -> list[str]:
    """A sentence on training examples that share text with validation or test, once for the same finding."""
    found = []
    for told in (run.facts.get("contamination") for run in runs):
        if isinstance(told, Mapping):
            number = told.get("num_train", len(mappings(told.get("found"))))
            found.append(
                f"Contamination: {number} training questions share {told.get('n')} words in a row with validation or "
                f"test; {told.get('num_dropped')} of them were dropped."
            )
    return list(dict.fromkeys(found)) or ["Contamination: not measured."]


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
    said = [textwrap.fill(visible(text, MOST_OF_A_SENTENCE), TEXT_WIDTH) for text in _remarks(summary)]
    rows = [cost_row(cost(arm, given)) for arm in summary.trained]
    narrow = [[text.replace("not measured", "-") for text in row[1:]] for row in rows]
    spent = _aligned(COST_TITLES, [row[0] for row in rows], narrow) if rows else []
    facts = [textwrap.fill(visible(text), TEXT_WIDTH) for text in _facts(summary, given)]
    parts = (table, apart, said, spent, facts)
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
    lines = ["# Distillation report", "", *(f"- {_plain(text)}" for text in _remarks(summary))]
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
    return "\n".join([*lines, *(f"- {_plain(text)}" for text in _facts(summary, given)), ""])


def _grid(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *rows)]


def _plain(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>|#~$&])", r"\\\1", visible(text).replace("\n", " "))


def columns(summary: Summary) -> tuple[Column, ...]:
    """The columns of the results; the peak of memory where it was measured."""
    is_measured = any(not math.isnan(arm.stat(PEAK.key).mean) for arm in summary.arms)
    return (*COLUMNS, PEAK) if is_measured else COLUMNS


def _remarks(summary: Summary) -> list[str]:
    """Verdicts with their caveats, then all else that a reader must know, a sentence each."""
    said = [" ".join((verdict.sentence, *verdict.caveats)) for verdict in summary.verdicts]
    return (said or [NOTHING]) + list(summary.notes)


def _facts(summary: Summary, given: Json) -> list[str]:
    """What mattered in a sweep, what it cost, what became of the rationales, and how clean the data is."""
    spent = [cost_note([cost(arm, given) for arm in summary.trained])] if summary.trained else []
    mattered = effect_lines(effects(summary.trained))
    return [*mattered, *spent, *yield_lines(yields(summary.trained)), *contamination_lines(summary.runs)]


def effect_lines(found: Sequence[Effect]) -> list[str]:
    """A sentence on how much each setting of a sweep matters."""
    parts = ", ".join(f"{effect.setting} {100 * effect.share:.0f} %" for effect in found)
    return [f"What mattered, as a share of the variance of accuracy between runs: {parts}."] if found else []


def tables(summary: Summary, given: Json = NO_PRICES) -> dict[str, list[dict[str, Any]]]:
    """The report's tables as plain rows; all rows of a table have the same keys."""
    keys = [column.key for column in (*COLUMNS, PEAK)]
    return {
        "differences": [_difference_values(verdict) for verdict in summary.verdicts if verdict.difference],
        "contrasts": [_contrast_values(contrast) for contrast in summary.contrasts],
        "comparison": [
            {"model": arm.label, "low": arm.interval[0], "high": arm.interval[1]} | {k: arm.stat(k).mean for k in keys}
            for arm in summary.arms
            if arm.rows
        ],
        "cost": [cost(arm, given)._asdict() | {"arm": arm.label} for arm in summary.trained],
        "by_confidence": [
            {"arm": arm.label, **part._asdict()} for arm, bins in confidence(summary.trained) for part in bins
        ],
        "yield": [
            {"arms": ", ".join(part.labels), "fate": fate, "num": num}
            for part in yields(summary.trained)
            for fate, num in {"kept": part.kept, **part.rejected}.items()
        ],
    }


def _difference_values(verdict: Verdict) -> dict[str, Any]:
    assert verdict.difference is not None
    difference, share = verdict.difference, verdict.difference.share
    low, high = difference.ends or (None, None)
    return {
        "arm": difference.arm.label,
        "against": difference.rival.label,
        "points": difference.points,
        "low": low,
        "high": high,
        "level": difference.level,
        "recovered": share.estimate if share else None,
        "detectable": difference.detectable,
        "over_hard_labels": verdict.beside.points if verdict.beside else None,
        "verdict": difference.status,
    }


def _contrast_values(contrast: Contrast) -> dict[str, Any]:
    difference = contrast.difference
    low, high = difference.ends or (None, None)
    told = {"losses": contrast.losses, "choice": contrast.choice, "points": difference.points, "low": low, "high": high}
    return told | {"level": difference.level, "detectable": difference.detectable, "verdict": difference.status}


def to_html(summary: Summary, given: Json = NO_PRICES) -> str:
    """One page that needs no network; all text is escaped and made visible, all but verdicts cut to 500 characters."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    pages = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    pages.trim_blocks = pages.lstrip_blocks = True
    pages.finalize = lambda value: visible(value) if type(value) is str else value
    run, groups = outcomes(summary)
    filters, rationales = reasoning(summary)
    costs = [cost(arm, given) for arm in summary.trained]
    making = [cost(arm, given).making if arm.runs else None for arm in summary.arms]
    drawn = {
        "costs": costs,
        "yields": yields(summary.trained),
        "confidence": confidence(summary.trained),
        "charts": charts(summary.trained),
        "fronts": fronts(summary.arms, making, " and ".join(dict.fromkeys(part.unit for part in costs))),
        "unbeaten": unbeaten(summary.arms, making),
        "effects": effects(summary.trained),
    }
    shown = {"sampled": run, "outcomes": groups, "filters": filters, "rationales": rationales, "nothing": NOTHING}
    names = {"cell": cell, "columns": columns(summary), "seed_columns": SEED_COLUMNS, "command": BASELINE_COMMAND}
    texts = {"cost_titles": COST_TITLES, "cost_row": cost_row, "cost_note": cost_note, "difference_row": difference_row}
    texts |= {"contrast_titles": contrast_titles, "contrast_row": contrast_row}
    texts |= {"whole": lambda text: Whole(visible(text, MOST_OF_A_SENTENCE))}
    lines = {"titles": difference_titles(summary), "contamination": contamination_lines(summary.runs)}
    plain = {
        "flatten": flatten,
        "mapping": mapping,
        "mappings": mappings,
        "number": number,
        "math": math,
        "short": short,
    }
    page = pages.get_template("report.html.j2")
    return page.render(summary=summary, **drawn, **shown, **names, **texts, **lines, **plain)


def write_report(
    run_dirs: Sequence[str | Path], out_dir: str | Path, *, level: float = 0.95, given: Json = NO_PRICES
) -> Summary:
    """Write report.html and report.md, each whole or not at all; ConfigError lists every unfit folder.

    `level` is that of all verdicts together; prices that are `given` go before those of the runs.
    """
    summary = summarise(read_runs(run_dirs), level)
    for name, text in (("report.html", to_html(summary, given)), ("report.md", to_markdown(summary, given))):
        with whole_file(Path(out_dir) / name) as part:
            part.write_text(text, encoding="utf-8")
    return summary
