"""The report's tables: titles and cells for readers, and plain rows for programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from distill.app.files import Json
from distill.reports.arms import COLUMNS, PEAK, Column
from distill.reports.charts import confidence
from distill.reports.costs import Cost, break_even_text, cost, yields
from distill.reports.verdicts import Contrast, Difference, Summary, Verdict, share_text

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
    return (*COLUMNS, PEAK) if is_measured else COLUMNS


def difference_titles(summary: Summary) -> list[str]:
    """Return the headings of the table of differences; they name the level."""
    return [
        "arm",
        "points",
        _interval_title([verdict.difference for verdict in summary.verdicts if verdict.difference]),
        "recovered",
        "over hard labels",
        "verdict",
    ]


def difference_row(verdict: Verdict) -> list[str]:
    """Return the cells of a line of the table of differences."""
    difference, over_hard = verdict.difference, verdict.over_hard_labels
    if difference is None:
        return [verdict.arm.label, "-", "-", "-", "-", verdict.status]
    share = share_text(difference) if difference.share or not difference.has_teacher else "no advantage"
    hard_labels = " ".join(_points_cells(over_hard)) if over_hard else "-"
    return [verdict.arm.label, *_points_cells(difference), share, hard_labels, verdict.status]


def contrast_titles(summary: Summary) -> list[str]:
    """Return the headings of the table of contrasts."""
    return [
        "changed setting",
        "points",
        _interval_title([contrast.difference for contrast in summary.contrasts]),
        "verdict",
    ]


def contrast_row(contrast: Contrast) -> list[str]:
    """Return the cells of a line of the table of contrasts."""
    difference = contrast.difference
    return [f"{contrast.losses}: {contrast.change}", *_points_cells(difference), difference.status]


def _points_cells(difference: Difference) -> tuple[str, str]:
    ends = difference.ends
    return f"{difference.points:+.1f}", f"[{ends[0]:+.1f}, {ends[1]:+.1f}]" if ends else "not paired"


def _interval_title(differences: Sequence[Difference]) -> str:
    levels = {f"{100 * difference.level:.3g} %" for difference in differences}
    return f"{'/'.join(sorted(levels)) or '95 %'} interval"


def cost_row(arm_cost: Cost) -> list[str]:
    """Return the cells of a line of the table of costs."""
    times = map(duration, (arm_cost.annotation_seconds, arm_cost.training_seconds, arm_cost.evaluation_seconds))
    amounts = map(money, (arm_cost.total, arm_cost.student_per_1000, arm_cost.teacher_per_1000))
    return [arm_cost.arm.label, *times, *amounts, break_even_text(arm_cost)]


def duration(seconds: float | None) -> str:
    """Format a time in the largest of hours, minutes and seconds that is at least 1."""
    if seconds is None:
        return "not measured"
    size, unit = next((part for part in COLUMNS[-1].units if seconds >= part[0]), (1.0, " s"))
    return f"{seconds / size:.1f}{unit}"


def money(amount: float | None) -> str:
    """Format an amount, with three significant digits below 100."""
    return "not measured" if amount is None else f"{amount:,.3g}" if amount < 100 else f"{amount:,.0f}"


def short(value: int | float) -> str:
    """Format a number at an axis: 1600 as 1.6k."""
    size, unit = next((part for part in COLUMNS[5].units if abs(value) >= part[0]), (1.0, ""))
    return f"{value / size:.4g}{unit.strip()}"


def tables(summary: Summary, prices: Json = NO_PRICES) -> dict[str, list[dict[str, Any]]]:
    """Return the report's tables as plain rows; all rows of a table have the same keys."""
    keys = [column.key for column in (*COLUMNS, PEAK)]
    return {
        "differences": [_difference_values(verdict) for verdict in summary.verdicts if verdict.difference],
        "contrasts": [_contrast_values(contrast) for contrast in summary.contrasts],
        "comparison": [
            {"model": arm.label, "low": arm.interval[0], "high": arm.interval[1]} | {k: arm.stat(k).mean for k in keys}
            for arm in summary.arms
            if arm.rows
        ],
        "cost": [cost(arm, prices)._asdict() | {"arm": arm.label} for arm in summary.trained],
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
        "over_hard_labels": verdict.over_hard_labels.points if verdict.over_hard_labels else None,
        "verdict": difference.status,
    }


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
    return values | {"level": difference.level, "detectable": difference.detectable, "verdict": difference.status}
