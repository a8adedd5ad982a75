"""The report's tables: titles and cells for readers, and plain rows for programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from distill.reports.arms import COLUMNS, PEAK, Column
from distill.reports.charts import confidence
from distill.reports.costs import Cost, break_even_text, cost, yields
from distill.reports.runs import Json
from distill.reports.verdicts import Contrast, Difference, Summary, Verdict, share_text

NO_PRICES: Json = {}
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


def columns(summary: Summary) -> tuple[Column, ...]:
    """The columns of the results; the peak of memory where it was measured."""
    is_measured = any(not math.isnan(arm.stat(PEAK.key).mean) for arm in summary.arms)
    return (*COLUMNS, PEAK) if is_measured else COLUMNS


def difference_titles(summary: Summary) -> list[str]:
    """Headings of the table of differences, which name the level."""
    return [
        "arm",
        "points",
        _interval_title([verdict.difference for verdict in summary.verdicts if verdict.difference]),
        "recovered",
        "over hard labels",
        "verdict",
    ]


def difference_row(verdict: Verdict) -> list[str]:
    """The cells of one line of the table of differences."""
    difference, beside = verdict.difference, verdict.beside
    if difference is None:
        return [verdict.arm.label, "-", "-", "-", "-", verdict.status]
    share = share_text(difference) if difference.share or not difference.has_teacher else "none to recover"
    return [verdict.arm.label, *_apart(difference), share, " ".join(_apart(beside)) if beside else "-", verdict.status]


def contrast_titles(summary: Summary) -> list[str]:
    """Headings of the table of arms that are one choice apart."""
    return ["one choice apart", "points", _interval_title([each.difference for each in summary.contrasts]), "verdict"]


def contrast_row(contrast: Contrast) -> list[str]:
    """The cells of one line of the table of arms that are one choice apart."""
    difference = contrast.difference
    return [f"{contrast.losses}: {contrast.choice}", *_apart(difference), difference.status]


def _apart(difference: Difference) -> tuple[str, str]:
    ends = difference.ends
    return f"{difference.points:+.1f}", f"[{ends[0]:+.1f}, {ends[1]:+.1f}]" if ends else "not paired"


def _interval_title(found: Sequence[Difference]) -> str:
    levels = {f"{100 * difference.level:.3g} %" for difference in found}
    return f"{'/'.join(sorted(levels)) or '95 %'} interval"


def cost_row(part: Cost) -> list[str]:
    """The cells of one line of the table of costs."""
    work = map(duration, (part.annotation_seconds, part.training_seconds, part.evaluation_seconds))
    paid = map(money, (part.making, part.student_per_1000, part.teacher_per_1000))
    return [part.arm.label, *work, *paid, break_even_text(part)]


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
