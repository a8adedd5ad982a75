"""What an arm cost to make, what a request to it costs, and when it has paid its making back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from distill.reports.arms import Arm
from distill.reports.runs import Json, Run, mapping, number
from distill.reports.statistics import break_even

SECONDS_PER_HOUR = 3600
TIME = "machine seconds"


@dataclass(frozen=True)
class Prices:
    """Price of a machine's hour with its power, and of a bought request to the teacher; None: not given."""

    per_hour: float | None
    teacher_per_request: float | None
    currency: str
    requests_per_day: float | None

    @property
    def unit(self) -> str:
        """The currency; machine seconds where no hour has a price."""
        return TIME if self.per_hour is None else self.currency

    def of(self, seconds: float | None) -> float | None:
        """What so many seconds of the machine cost, in `unit`."""
        if seconds is None or self.per_hour is None:
            return seconds
        return seconds / SECONDS_PER_HOUR * self.per_hour


class Cost(NamedTuple):
    """An arm's seconds of work for one student, and its costs in `unit`; None: not measured."""

    arm: Arm
    annotation_seconds: float | None
    training_seconds: float | None
    evaluation_seconds: float | None
    unit: str
    making: float | None
    student_per_1000: float | None
    teacher_per_1000: float | None
    break_even_requests: float | None
    break_even_days: float | None


class Yield(NamedTuple):
    """What became of the rationales that the teacher wrote for the arms named."""

    labels: tuple[str, ...]
    kept: int
    rejected: Mapping[str, int]

    @property
    def share(self) -> float:
        """Share of the rationales that was kept."""
        return self.kept / (self.kept + sum(self.rejected.values()))


def prices(config: Json, given: Json) -> Prices:
    """The prices in a run's configuration, those `given` first."""
    told = {**mapping(config.get("cost")), **{key: value for key, value in given.items() if value is not None}}
    hour, watts, energy, bought = (
        number(told.get(key)) for key in ("price_per_hour", "watts", "price_per_kwh", "teacher_price_per_1000")
    )
    power = None if watts is None or energy is None else watts / 1000 * energy
    parts = [part for part in (hour, power) if part is not None]
    return Prices(
        per_hour=sum(parts) if parts else None,
        teacher_per_request=None if bought is None else bought / 1000,
        currency=str(told.get("currency") or "of no named currency"),
        requests_per_day=number(told.get("requests_per_day")),
    )


def cost(arm: Arm, given: Json) -> Cost:
    """The costs of a trained arm, a mean over its seeds; the baseline needs no annotation."""
    price = prices(arm.runs[-1].config, given)
    annotation = 0.0 if arm.kind == "baseline" else _mean(arm.runs, "cache", "annotation_seconds")
    training, evaluation = (_mean(arm.runs, "seconds", key) for key in ("train", "evaluate"))
    work = [annotation, training, evaluation]
    making = None if None in work else price.of(math.fsum(part for part in work if part is not None))
    student = price.of(_seconds_per_request(arm.rows))
    teacher = price.of(_seconds_per_request([run.rows.get("teacher", {}) for run in arm.runs]))
    if price.per_hour is not None and price.teacher_per_request is not None:
        teacher = price.teacher_per_request
    requests = None
    if making is not None and student is not None and teacher is not None:
        requests = break_even(making, teacher, student)
    days = requests / price.requests_per_day if requests is not None and price.requests_per_day else None
    each = (_thousand(student), _thousand(teacher))
    return Cost(arm, annotation, training, evaluation, price.unit, making, *each, requests, days)


def break_even_text(cost: Cost) -> str:
    """After how many requests the student has paid its making back; never where one to it is not cheaper."""
    if cost.making is None or cost.student_per_1000 is None or cost.teacher_per_1000 is None:
        return "not measured"
    if cost.break_even_requests is None:
        return "never"
    days = "" if cost.break_even_days is None else f" ({cost.break_even_days:,.2g} days)"
    return f"{math.ceil(cost.break_even_requests):,}{days}"


def _thousand(price: float | None) -> float | None:
    return None if price is None else 1000 * price


def _mean(runs: Sequence[Run], *keys: str) -> float | None:
    section, key = keys
    values = [value for run in runs if (value := number(mapping(run.facts.get(section)).get(key))) is not None]
    return math.fsum(values) / len(values) if values else None


def _seconds_per_request(rows: Sequence[Json]) -> float | None:
    values = [value / 1000 for row in rows if (value := number(row.get("ms_per_example"))) is not None]
    return math.fsum(values) / len(values) if values else None


def yields(arms: Sequence[Arm]) -> list[Yield]:
    """What became of the rationales, once for arms of which the same was told."""
    found: dict[str, Yield] = {}
    for arm in arms:
        for run in arm.runs:
            counts = mapping(run.facts.get("counts"))
            rejected = {str(key): int(number(n) or 0) for key, n in mapping(counts.get("rationales_rejected")).items()}
            kept = int(number(counts.get("rationales_kept")) or 0)
            if kept + sum(rejected.values()):
                known = found.get(key := str((kept, sorted(rejected.items()))))
                labels = dict.fromkeys((*(known.labels if known else ()), arm.label))
                found[key] = Yield(tuple(labels), kept, rejected)
    return list(found.values())
