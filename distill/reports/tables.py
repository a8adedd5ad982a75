"""The report's tables: titles and cells for readers, and plain rows for programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from distill.app.files import Json
from distill.reports.arms import COLUMNS, PEAK, SEED_COLUMNS, Column, judged_columns
from distill.reports.charts import confidence
from distill.reports.classes import Confusion, confusion
from distill.reports.contrasts import Contrast
from distill.reports.costs import TIME, Cost, break_even_text, cost, yields
from distill.reports.differences import Difference, interval_title
from distill.reports.selective import SHARES, Selective, selective
from distill.reports.steps import StepsToEqual, steps_to_equal
from distill.reports.verdicts import Summary, Verdict, share_text

NO_PRICES: Json = {}
COST_TITLES = (
    "per student",
    "annotate",
    "train",
    "evaluate",
    "total",
    "1000 to student",
    "1000 to teacher",
    "breaks even after",
)


def columns(summary: Summary) -> tuple[Column, ...]:
    """Return the columns of the results, with peak memory if it was measured."""
    is_measured = any(not math.isnan(arm.stat(PEAK.key).mean) for arm in summary.arms)
    return judged_columns(summary.arms, (*COLUMNS, PEAK) if is_measured else COLUMNS)


def seed_columns(summary: Summary) -> tuple[Column, ...]:
    """Return the columns of the results of each seed."""
    return judged_columns(summary.arms, SEED_COLUMNS)


def unit(summary: Summary) -> str:
    """Return the unit of the differences between arms."""
    return " or ".join(dict.fromkeys(arm.measure.unit_of_differences for arm in summary.trained)) or "points"


def difference_titles(summary: Summary) -> list[str]:
    """Return the headings of the table of differences; they name the level."""
    return [
        "arm",
        unit(summary),
        interval_title([verdict.difference for verdict in summary.verdicts if verdict.difference]),
        "recovered",
        "over hard labels",
        "verdict",
    ]


def difference_row(verdict: Verdict) -> list[str]:
    """Return the cells of a line of the table of differences."""
    difference, over_hard = verdict.difference, verdict.over_hard_labels
    if difference is None:
        return [verdict.arm.label, "-", "-", "-", "-", verdict.wording]
    share = share_text(difference) if difference.share or not difference.has_teacher else "no advantage"
    share = "-" if verdict.status in ("not learned", "all right") else share
    hard_labels = " ".join(_points_cells(over_hard)) if over_hard else "-"
    return [verdict.arm.label, *_points_cells(difference), share, hard_labels, verdict.wording]


def contrast_titles(summary: Summary) -> list[str]:
    """Return the headings of the table of contrasts."""
    return [
        "changed setting",
        unit(summary),
        interval_title([contrast.difference for contrast in summary.contrasts]),
        "verdict",
    ]


def contrast_row(contrast: Contrast) -> list[str]:
    """Return the cells of a line of the table of contrasts."""
    difference = contrast.difference
    return [f"{contrast.losses}: {contrast.change}", *_points_cells(difference), difference.wording]


def _points_cells(difference: Difference) -> tuple[str, str]:
    ends = difference.ends
    measure = difference.measure
    shown = f"{difference.points:+.{measure.digits}f}"
    return shown, f"[{measure.ends(ends)}]" if ends else "not paired"


def cost_row(arm_cost: Cost) -> list[str]:
    """Return the cells of a line of the table of costs."""
    times = map(duration, (arm_cost.annotation_seconds, arm_cost.training_seconds, arm_cost.evaluation_seconds))
    amounts = (
        money(amount, arm_cost.unit)
        for amount in (arm_cost.total, arm_cost.student_per_1000, arm_cost.teacher_per_1000)
    )
    return [arm_cost.arm.label, *times, *amounts, break_even_text(arm_cost)]


def duration(seconds: float | None) -> str:
    """Format a time in the largest of hours, minutes and seconds that is at least 1."""
    if seconds is None:
        return "not measured"
    size, unit = next((part for part in COLUMNS[-1].units if seconds >= part[0]), (1.0, " s"))
    return f"{seconds / size:.1f}{unit}"


def money(amount: float | None, unit: str) -> str:
    """Format an amount with its unit, with three significant digits below 100; machine seconds as a time."""
    if amount is None or unit == TIME:
        return duration(amount)
    return f"{amount:,.3g} {unit}".strip() if amount < 100 else f"{amount:,.0f} {unit}".strip()


def confusions(summary: Summary) -> list[Confusion]:
    """Return the answers by class of each trained arm on a task with classes."""
    return [table for arm in summary.trained if (table := confusion(arm))]


def class_titles(table: Confusion) -> list[str]:
    """Return the headings of the answers by class."""
    return ["right answer", "answers", "recall", "precision", *(f"as “{answer}”" for answer in table.answers)]


def class_rows(table: Confusion) -> list[list[str]]:
    """Return a line of cells for each class."""
    return [
        [
            row.name,
            f"{row.num:,}",
            f"{100 * row.recall:.1f} %",
            "-" if row.precision is None else f"{100 * row.precision:.1f} %",
            *map(str, row.answers),
        ]
        for row in table.rows
    ]


def recall_titles(tables: Sequence[Confusion]) -> list[str]:
    """Return the headings of the table of recalls: every class of the arms' tasks."""
    return ["recall by class", *dict.fromkeys(row.name for table in tables for row in table.rows)]


def recall_row(table: Confusion, names: Sequence[str]) -> list[str]:
    """Return an arm's share of right answers to the questions of each class."""
    recalls = {row.name: f"{100 * row.recall:.1f} %" for row in table.rows}
    return [table.arm.label, *(recalls.get(name, "-") for name in names)]


SELECTIVE_TITLES = ("questions answered, most confident first", *(f"{share} %" for share in SHARES))


def selective_row(model: Selective) -> list[str]:
    """Return a model's accuracy for each share of the questions."""
    deviations = [""] * len(SHARES)
    if model.deviations is not None:
        deviations = [f" ± {100 * deviation:.1f}" for deviation in model.deviations]
    parts = zip(model.accuracies, deviations, strict=True)
    return [model.arm.label, *(f"{100 * accuracy:.1f}{deviation} %" for accuracy, deviation in parts)]


STEPS_TITLES = ("arm", "as good as", "steps to equal")


def steps_row(pair: StepsToEqual) -> list[str]:
    """Return the cells of a line of the table of steps."""
    return [pair.arm.label, pair.rival.label, pair.text]


def guess_rows(summary: Summary, num_columns: int, *, is_narrow: bool = False) -> list[list[str]]:
    """Return lines of the results for answers that need no model."""
    unit = "" if is_narrow else " %"
    rest = ["-"] * (num_columns - 1)
    return [[guess.label, f"{100 * guess.accuracy:.1f}{unit}", *rest] for guess in summary.guesses]


def short(value: int | float) -> str:
    """Format a number at an axis: 1600 as 1.6k."""
    size, unit = next((part for part in COLUMNS[5].units if abs(value) >= part[0]), (1.0, ""))
    return f"{value / size:.4g}{unit.strip()}"


def tables(summary: Summary, prices: Json = NO_PRICES) -> dict[str, list[dict[str, Any]]]:
    """Return the report's tables as plain rows; all rows of a table have the same keys."""
    keys = [column.key for column in judged_columns(summary.arms, (*COLUMNS, PEAK))]
    return {
        "differences": [_difference_values(verdict) for verdict in summary.verdicts if verdict.difference],
        "contrasts": [_contrast_values(contrast) for contrast in summary.contrasts],
        "bag_of_words": list(map(_words_values, summary.words)),
        "comparison": [
            {"model": arm.label, "low": arm.interval[0], "high": arm.interval[1]} | {k: arm.stat(k).mean for k in keys}
            for arm in summary.arms
            if arm.rows
        ],
        "steps_to_equal": [
            {"arm": pair.arm.label, "rival": pair.rival.label, "seed": seed, "ratio": ratio, "is_bound": pair.is_bound}
            for pair in steps_to_equal(summary.trained)
            for seed, ratio in pair.ratios.items()
        ],
        "guesses": [guess._asdict() for guess in summary.guesses],
        "classes": [
            {"arm": table.arm.label} | {key: getattr(row, key) for key in ("name", "num", "recall", "precision")}
            for table in confusions(summary)
            for row in table.rows
        ],
        "cost": [cost(arm, prices)._asdict() | {"arm": arm.label} for arm in summary.trained],
        "by_confidence": [
            {"arm": arm.label, **part._asdict()} for arm, bins in confidence(summary.trained) for part in bins
        ],
        "selective": [
            {"arm": model.arm.label, "share": share, "accuracy": accuracy}
            for model in selective(summary.arms)
            for share, accuracy in zip(SHARES, model.accuracies, strict=True)
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
        "over_hard_labels": verdict.over_hard_labels.points if verdict.over_hard_labels else None,
        "verdict": verdict.wording,
    }


def _words_values(difference: Difference) -> dict[str, Any]:
    low, high = difference.ends or (None, None)
    values = {"arm": difference.arm.label, "accuracy": difference.rival.accuracy, "points": difference.points}
    values |= {"low": low, "high": high, "level": difference.level}
    return values | {"detectable": difference.detectable, "verdict": difference.wording}


def _contrast_values(contrast: Contrast) -> dict[str, Any]:
    difference = contrast.difference
    low, high = difference.ends or (None, None)
    values = {
        "losses": contrast.losses,
        "change": contrast.change,
        "points": difference.points,
        "low": low,
        "high": high,
    }
    return values | {"level": difference.level, "detectable": difference.detectable, "verdict": difference.wording}
