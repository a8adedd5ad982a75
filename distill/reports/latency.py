"""Times per answer: models of one architecture share a measurement, and noise decides nothing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from distill.app.files import Json
from distill.reports.runs import Run, number


class Spread(NamedTuple):
    """A measured value, and the least and the greatest that repetitions gave."""

    value: float
    low: float
    high: float


def spread(row: Json) -> Spread | None:
    """Return the milliseconds per answer of a row of results; without repetitions, its ends are the value."""
    value, low, high = (number(row.get(key)) for key in ("ms_per_example", "ms_fastest", "ms_slowest"))
    return None if value is None else Spread(value, value if low is None else low, value if high is None else high)


def share_latencies(runs: Sequence[Run]) -> list[Run]:
    """Return the runs with one measurement per architecture: the median over its runs, and the ends of all.

    An architecture that was timed in one run alone varies between runs too: its ends are moved apart by the greatest
    ratio that is found between two runs of another. Rows without an architecture stay as they are.
    """
    measured: dict[str, list[Spread]] = {}
    for run in runs:
        for kind, row in run.rows.items():
            if kind != "before" and row.get("architecture") and (times := spread(row)):  # "before" has the student's
                measured.setdefault(str(row["architecture"]), []).append(times)
    ratios = [max(times)[0] / min(times)[0] for times in measured.values() if min(times)[0] > 0]
    factor = math.sqrt(max(ratios, default=1.0))
    shared = {key: _joined(times, factor) for key, times in measured.items()}
    return [replace(run, rows={kind: _with_shared(row, shared) for kind, row in run.rows.items()}) for run in runs]


def _joined(times: Sequence[Spread], factor: float) -> Spread:
    low, high = min(spread.low for spread in times), max(spread.high for spread in times)
    if len(times) == 1:
        low, high = low / factor, high * factor
    return Spread(statistics.median(spread.value for spread in times), low, high)


def _with_shared(row: Json, shared: Mapping[str, Spread]) -> Json:
    times = shared.get(str(row.get("architecture")))
    if times is None:
        return row
    return {**row, "ms_per_example": times.value, "ms_fastest": times.low, "ms_slowest": times.high}


def joint(spreads: Iterable[Spread | None]) -> Spread | None:
    """Return the mean of several spreads with the ends of all; None without any."""
    known = [spread for spread in spreads if spread]
    if not known:
        return None
    mean = statistics.fmean(spread.value for spread in known)
    return Spread(mean, min(spread.low for spread in known), max(spread.high for spread in known))


def ranks(spreads: Sequence[Spread | None]) -> list[float]:
    """Rank from the least; spreads that overlap, at once or by way of others, share a rank. What is missing is last."""
    order = sorted((spread.low, spread.high, index) for index, spread in enumerate(spreads) if spread)
    ranked, reach, rank = [math.inf] * len(spreads), -math.inf, 0.0
    for low, high, index in order:
        rank += low > reach
        reach = max(reach, high)
        ranked[index] = rank
    return ranked
