"""What producing a student costs, what a request to it costs, and after how many requests it breaks even."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from distill.app.files import Json
from distill.reports.arms import Arm
from distill.reports.latency import Spread, joint, spread
from distill.reports.runs import Run, mapping, number
from distill.reports.statistics import break_even

SECONDS_PER_HOUR = 3600
TIME = "machine seconds"


@dataclass(frozen=True)
class Prices:
    """Prices of a machine hour, power included, and of a paid request to the teacher; None if unknown."""

    per_hour: float | None
    teacher_per_request: float | None
    currency: str
    requests_per_day: float | None

    @property
    def unit(self) -> str:
        """The currency, empty if unnamed, or machine seconds if an hour has no price."""
        return TIME if self.per_hour is None else self.currency

    def of(self, seconds: float | None) -> float | None:
        """Return the cost of these machine seconds, in `unit`."""
        if seconds is None or self.per_hour is None:
            return seconds
        return seconds / SECONDS_PER_HOUR * self.per_hour


class Cost(NamedTuple):
    """Seconds of work that one student of an arm takes, and its costs in `unit`; None if not measured.

    `total` is the cost of producing the student: annotation, training and evaluation. `is_cheaper` says whether a
    request to the student is cheaper than one to the teacher; None if their times overlap or were not measured.
    """

    arm: Arm
    annotation_seconds: float | None
    training_seconds: float | None
    evaluation_seconds: float | None
    unit: str
    total: float | None
    student_per_1000: float | None
    teacher_per_1000: float | None
    break_even_requests: float | None
    break_even_days: float | None
    is_cheaper: bool | None


class Yield(NamedTuple):
    """Numbers of kept and rejected rationales of the named arms."""

    labels: tuple[str, ...]
    kept: int
    rejected: Mapping[str, int]

    @property
    def share(self) -> float:
        """Share of rationales that were kept."""
        return self.kept / (self.kept + sum(self.rejected.values()))


def read_prices(config: Json, overrides: Json) -> Prices:
    """Return the prices in a run's configuration, overridden by `overrides`."""
    values = {**mapping(config.get("cost")), **{key: value for key, value in overrides.items() if value is not None}}
    hour, watts, energy, bought = (
        number(values.get(key)) for key in ("price_per_hour", "watts", "price_per_kwh", "teacher_price_per_1000")
    )
    power = None if watts is None or energy is None else watts / 1000 * energy
    parts = [part for part in (hour, power) if part is not None]
    return Prices(
        per_hour=sum(parts) if parts else None,
        teacher_per_request=None if bought is None else bought / 1000,
        currency=str(values.get("currency") or ""),
        requests_per_day=number(values.get("requests_per_day")),
    )


def cost(arm: Arm, overrides: Json) -> Cost:
    """Return the mean costs of a trained arm over its seeds; a student on labels alone needs no annotation."""
    price = read_prices(arm.runs[-1].config, overrides)
    annotation = 0.0 if arm.losses == ("answer",) else _mean(arm.runs, "cache", "annotation_seconds")
    training, evaluation = (_mean(arm.runs, "seconds", key) for key in ("train", "evaluate"))
    seconds = [annotation, training, evaluation]
    total = None if None in seconds else price.of(math.fsum(part for part in seconds if part is not None))
    student = _price(price, arm.rows)
    teacher = _price(price, [run.rows.get("teacher", {}) for run in arm.runs])
    if price.per_hour is not None and (bought := price.teacher_per_request) is not None:
        teacher = Spread(bought, bought, bought)
    is_cheaper = _is_below(student, teacher)
    requests = None
    if total is not None and student and teacher and is_cheaper:
        requests = break_even(total, teacher.value, student.value)
    days = requests / price.requests_per_day if requests is not None and price.requests_per_day else None
    per_1000 = (_thousand(student), _thousand(teacher))
    return Cost(arm, annotation, training, evaluation, price.unit, total, *per_1000, requests, days, is_cheaper)


def total_spread(arm: Arm, overrides: Json) -> Spread | None:
    """Return the total cost of a trained arm with the least and the greatest of its seeds."""
    totals = [total for seed in arm.seeds if (total := cost(seed, overrides).total) is not None]
    return joint(Spread(total, total, total) for total in totals)


def _price(price: Prices, rows: Sequence[Json]) -> Spread | None:
    """Return the price of a request, with that of the fastest and the slowest measurement."""
    times = joint(spread(row) for row in rows)
    prices = [price.of(milliseconds / 1000) for milliseconds in times] if times else []
    return Spread(*(value for value in prices if value is not None)) if prices else None


def _is_below(left: Spread | None, right: Spread | None) -> bool | None:
    if left is None or right is None or (left.low < right.high and right.low < left.high):
        return None
    return left.value < right.value


def break_even_text(cost: Cost) -> str:
    """Format the number of requests after which the student breaks even.

    "never" if its requests are not cheaper, "not shown" if the measured times overlap.
    """
    if cost.total is None or cost.student_per_1000 is None or cost.teacher_per_1000 is None:
        return "not measured"
    if cost.break_even_requests is None:
        return "never" if cost.is_cheaper is False else "not shown"
    days = "" if cost.break_even_days is None else f" ({cost.break_even_days:,.2g} days)"
    return f"{math.ceil(cost.break_even_requests):,}{days}"


def _thousand(price: Spread | None) -> float | None:
    return None if price is None else 1000 * price.value


def _mean(runs: Sequence[Run], *keys: str) -> float | None:
    section, key = keys
    values = [value for run in runs if (value := number(mapping(run.facts.get(section)).get(key))) is not None]
    return math.fsum(values) / len(values) if values else None


def yields(arms: Sequence[Arm]) -> list[Yield]:
    """Return the yield of rationales; arms with equal counts share an entry."""
    by_counts: dict[str, Yield] = {}
    for arm in arms:
        for run in arm.runs:
            counts = mapping(run.facts.get("counts"))
            rejected = {str(key): int(number(n) or 0) for key, n in mapping(counts.get("rationales_rejected")).items()}
            kept = int(number(counts.get("rationales_kept")) or 0)
            if kept + sum(rejected.values()):
                known = by_counts.get(key := str((kept, sorted(rejected.items()))))
                labels = dict.fromkeys((*(known.labels if known else ()), arm.label))
                by_counts[key] = Yield(tuple(labels), kept, rejected)
    return list(by_counts.values())
