"""Data of the page's charts: curves over data and size, confidence, Pareto fronts, effects of swept settings."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from distill.reports.arms import Arm
from distill.reports.latency import Spread, joint, ranks, spread
from distill.reports.measures import ACCURACY
from distill.reports.runs import Run, number
from distill.reports.statistics import Bin, PowerLaw, by_confidence, explained, fit_power_law, pareto

DATA_KEYS = ("labelled", "unlabelled", "cache")
BYTES_PER_WEIGHT = 2  # where the models' types differ, so that a type is no advantage


class Point(NamedTuple):
    """An arm at `x`; `place` is its index among the trained arms, None if it was not trained."""

    x: float
    arm: Arm
    place: int | None


@dataclass(frozen=True)
class Curve:
    """Accuracy of one set of losses over a count; `law` is a fit of the error if there are enough points."""

    label: str
    points: tuple[Point, ...]
    law: PowerLaw | None


@dataclass(frozen=True)
class Chart:
    """Curves over one axis, each with at least two distinct x."""

    title: str
    curves: tuple[Curve, ...]


@dataclass(frozen=True)
class Front:
    """Accuracy over a cost; `is_best` marks the points on the Pareto front."""

    title: str
    points: tuple[Point, ...]
    is_best: tuple[bool, ...]


class Level(NamedTuple):
    """A value of a setting, or a range of values, and the accuracy of each run that had it."""

    name: str
    accuracies: tuple[float, ...]


@dataclass(frozen=True)
class Effect:
    """A setting that a sweep varied, and the share of the variance of accuracy that it explains on its own."""

    setting: str
    share: float
    levels: tuple[Level, ...]


def confidence(arms: Sequence[Arm]) -> list[tuple[Arm, list[Bin]]]:
    """Bin accuracy by the teacher's confidence over all seeds of an arm; arms without confidences are left out."""
    binned = [(arm, by_confidence([line for run in arm.runs for line in run.predictions])) for arm in arms]
    return [(arm, bins) for arm, bins in binned if bins]


def charts(trained: Sequence[Arm]) -> list[Chart]:
    """Return accuracy over labelled examples, unlabelled examples and parameters, for each that varies."""
    axes: tuple[tuple[str, Callable[[Arm], float | None], Callable[[str], bool]], ...] = (
        ("labelled examples", lambda arm: number(arm.settings.get("labelled")), lambda key: key in DATA_KEYS),
        ("unlabelled examples", lambda arm: number(arm.settings.get("unlabelled")), lambda key: key in DATA_KEYS),
        ("parameters", lambda arm: _known(arm.stat("parameters").mean), _is_of_student),
    )
    candidates = [Chart(title, _curves(trained, x_of, is_free)) for title, x_of, is_free in axes]
    return [chart for chart in candidates if chart.curves]


def _is_of_student(key: str) -> bool:
    return key == "start" or key.startswith("student.")


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _curves(
    trained: Sequence[Arm], x_of: Callable[[Arm], float | None], is_free: Callable[[str], bool]
) -> tuple[Curve, ...]:
    """Return a curve for each group of arms that differ only in free settings and in x."""
    groups: dict[str, list[Point]] = {}
    for index, arm in enumerate(trained):
        fixed = {key: value for key, value in arm.settings.items() if not is_free(key)}
        if (x := x_of(arm)) is not None and not math.isnan(arm.accuracy):
            groups.setdefault(str((arm.losses, sorted(fixed.items()))), []).append(Point(x, arm, index))
    ordered = [sorted(points, key=lambda point: point.x) for points in groups.values()]
    return tuple(_curve(points) for points in ordered if len({point.x for point in points}) > 1)


def _curve(points: Sequence[Point]) -> Curve:
    first = points[0].arm
    law = fit_power_law([point.x for point in points], [1 - point.arm.accuracy for point in points])
    return Curve(first.name, tuple(points), law)


def fronts(arms: Sequence[Arm], totals: Sequence[float | Spread | None], unit: str) -> list[Front]:
    """Return accuracy over size, latency and cost, for each that differs between arms; `totals` in `unit`."""
    places: Mapping[int, int] = {id(arm): index for index, arm in enumerate(arm for arm in arms if arm.runs)}
    differing = []
    for title, values in _axes(arms, totals, unit).items():
        judged = [(arm, value) for arm, value in zip(arms, values, strict=True) if not math.isnan(arm.accuracy)]
        measured = [(arm, value) for arm, value in judged if value is not None]
        points = [Point(value.value, arm, places.get(id(arm))) for arm, value in measured]
        costs = ranks([value for _, value in measured])
        best = pareto([(point.arm.accuracy, rank) for point, rank in zip(points, costs, strict=True)])
        if len({point.x for point in points}) > 1:
            differing.append(Front(title, tuple(points), tuple(best)))
    return differing


def unbeaten(arms: Sequence[Arm], totals: Sequence[float | Spread | None]) -> list[bool]:
    """Mark the arms that no other dominates in accuracy, size, latency and cost; a missing value counts as worst.

    Values whose spreads overlap are tied.
    """
    axes = [ranks(values) for values in _axes(arms, totals, "").values()]
    accuracies = (-math.inf if math.isnan(arm.accuracy) else arm.accuracy for arm in arms)
    return pareto(list(zip(accuracies, *axes, strict=True)))


def _axes(arms: Sequence[Arm], totals: Sequence[float | Spread | None], unit: str) -> dict[str, list[Spread | None]]:
    title, sizes = _sizes(arms)
    latencies = [joint(spread(row) for row in arm.rows) for arm in arms]
    costs = [_exact(total) if isinstance(total, float | int) else total for total in totals]
    return {title: sizes, "ms per example": latencies, f"total cost, {unit}": costs}


def _sizes(arms: Sequence[Arm]) -> tuple[str, list[Spread | None]]:
    """Return sizes at like type: on disk, or by the number of weights if the arms' types differ."""
    if len({str(row["dtype"]) for arm in arms for row in arm.rows if row.get("dtype")}) < 2:
        return "size on disk, MB", [_exact(arm.stat("size_bytes").mean / 1e6) for arm in arms]
    title = f"size at {8 * BYTES_PER_WEIGHT} bits per weight, MB"
    return title, [_exact(BYTES_PER_WEIGHT * arm.stat("parameters").mean / 1e6) for arm in arms]


def _exact(value: float) -> Spread | None:
    return None if math.isnan(value) else Spread(value, value, value)


def effects(trained: Sequence[Arm]) -> list[Effect]:
    """Return the effect of each swept setting on the runs that have it, largest first.

    Empty if only losses and seeds differ: the arms themselves show that.
    """
    runs = [run for arm in trained if arm.measure is ACCURACY for run in arm.runs]
    accuracies = [number(run.rows["student"]["accuracy"]) or 0.0 for run in runs]
    swept = []
    for setting, values in _swept(runs).items():
        known = [(value, accuracy) for value, accuracy in zip(values, accuracies, strict=True) if value is not None]
        levels = _levels(*map(list, zip(*known, strict=True)))
        if len(levels) < len(known):
            swept.append(Effect(setting, explained([level.accuracies for level in levels]), levels))
    has_settings = any(effect.setting not in ("loss", "seed") for effect in swept)
    return sorted(swept, key=lambda effect: -effect.share) if has_settings else []


def _swept(runs: Sequence[Run]) -> dict[str, list[str | None]]:
    """Return the settings that differ between runs; of settings that split the runs alike, the shortest name."""
    flats = [{**run.choices, "loss": " + ".join(run.loss_labels)} for run in runs]
    keys = sorted({key for flat in flats for key in flat}, key=lambda key: (len(key), key))
    columns = {key: [flat.get(key) for flat in flats] for key in keys}
    by_split: dict[tuple[int, ...], str] = {}
    for key, values in columns.items():
        if len(set(values) - {None}) > 1:
            by_split.setdefault(tuple(-1 if value is None else values.index(value) for value in values), key)
    return {key: columns[key] for key in by_split.values()}


def _levels(values: Sequence[str], accuracies: Sequence[float]) -> tuple[Level, ...]:
    """Group runs by value or, if most values are distinct numbers as in a search, by thirds of the numbers."""
    numbers = [x for value in values if (x := number(value)) is not None]
    places: Sequence[float | str] = numbers if len(numbers) == len(values) else values
    groups: dict[float | str, list[int]] = {}
    is_cut = places is numbers and 2 * len(set(values)) > len(values)
    ordered = sorted(numbers)
    for index in sorted(range(len(values)), key=lambda index: places[index]):
        third = 3 * bisect_left(ordered, numbers[index]) // len(values) if is_cut else places[index]
        groups.setdefault(third, []).append(index)
    return tuple(Level(_name(values, group), tuple(accuracies[index] for index in group)) for group in groups.values())


def _name(values: Sequence[str], group: Sequence[int]) -> str:
    first, last = values[group[0]], values[group[-1]]
    return first if first == last else f"{float(first):.3g} to {float(last):.3g}"
