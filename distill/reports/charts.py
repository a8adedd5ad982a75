"""What the page draws beside the arms themselves: curves over data and size, confidence, fronts, swept settings."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from distill.reports.arms import Arm
from distill.reports.runs import Run, number
from distill.reports.statistics import Bin, PowerLaw, by_confidence, explained, fit_power_law, pareto

DATA = ("labelled", "unlabelled", "cache")
FRONTS = (("size_bytes", "size on disk, MB", 1e6), ("ms_per_example", "ms per example", 1.0))


class Point(NamedTuple):
    """An arm at its place; `place` is that among the trained arms, None for one that was only measured."""

    x: float
    arm: Arm
    place: int | None


@dataclass(frozen=True)
class Curve:
    """Accuracy of one set of losses over a count; `law` is the fit of the error, where there are enough points."""

    label: str
    points: tuple[Point, ...]
    law: PowerLaw | None


@dataclass(frozen=True)
class Chart:
    """Curves over one axis, of which at least one has two places."""

    title: str
    curves: tuple[Curve, ...]


@dataclass(frozen=True)
class Front:
    """Accuracy over what an answer costs; `is_best` marks the arms that no other beats."""

    title: str
    points: tuple[Point, ...]
    is_best: tuple[bool, ...]


class Level(NamedTuple):
    """One value of a setting, or a range of them, and the accuracy of each run that had it."""

    name: str
    accuracies: tuple[float, ...]


@dataclass(frozen=True)
class Effect:
    """A setting that a sweep varied, and the share of the accuracy's variance that it explains by itself."""

    setting: str
    share: float
    levels: tuple[Level, ...]


def confidence(arms: Sequence[Arm]) -> list[tuple[Arm, list[Bin]]]:
    """Accuracy by the teacher's confidence, all seeds of an arm together; arms without a confidence are left out."""
    told = [(arm, by_confidence([line for run in arm.runs for line in run.predictions])) for arm in arms]
    return [(arm, bins) for arm, bins in told if bins]


def charts(trained: Sequence[Arm]) -> list[Chart]:
    """Accuracy over labelled examples, unlabelled examples and parameters, where an arm has two or more of them."""
    axes: tuple[tuple[str, Callable[[Arm], float | None], Callable[[str], bool]], ...] = (
        ("labelled examples", lambda arm: number(arm.settings.get("labelled")), lambda key: key in DATA),
        ("unlabelled examples", lambda arm: number(arm.settings.get("unlabelled")), lambda key: key in DATA),
        ("parameters", lambda arm: _known(arm.stat("parameters").mean), _is_of_student),
    )
    found = [Chart(title, _curves(trained, place, is_free)) for title, place, is_free in axes]
    return [chart for chart in found if chart.curves]


def _is_of_student(key: str) -> bool:
    return key == "start" or key.startswith("student.")


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _curves(
    trained: Sequence[Arm], place: Callable[[Arm], float | None], is_free: Callable[[str], bool]
) -> tuple[Curve, ...]:
    """A curve for the arms that differ only in what is free."""
    groups: dict[str, list[Point]] = {}
    for index, arm in enumerate(trained):
        fixed = {key: value for key, value in arm.settings.items() if not is_free(key)}
        if (x := place(arm)) is not None:
            groups.setdefault(str((arm.losses, sorted(fixed.items()))), []).append(Point(x, arm, index))
    kept = [sorted(points, key=lambda point: point.x) for points in groups.values()]
    return tuple(_curve(points) for points in kept if len({point.x for point in points}) > 1)


def _curve(points: Sequence[Point]) -> Curve:
    first = points[0].arm
    label = "labels alone" if first.kind == "baseline" else " + ".join(first.losses)
    law = fit_power_law([point.x for point in points], [1 - point.arm.accuracy for point in points])
    return Curve(label, tuple(points), law)


def fronts(arms: Sequence[Arm], making: Sequence[float | None], unit: str) -> list[Front]:
    """Accuracy over size, latency and what each arm cost to make, where two or more arms differ in it."""
    places: Mapping[int, int] = {id(arm): index for index, arm in enumerate(arm for arm in arms if arm.runs)}
    found = []
    for title, values in _axes(arms, making, unit).items():
        told = [(arm, value) for arm, value in zip(arms, values, strict=True) if arm.rows and value is not None]
        points = [Point(value, arm, places.get(id(arm))) for arm, value in told]
        best = pareto([(point.arm.accuracy, point.x) for point in points])
        if len({point.x for point in points}) > 1:
            found.append(Front(title, tuple(points), tuple(best)))
    return found


def unbeaten(arms: Sequence[Arm], making: Sequence[float | None]) -> list[bool]:
    """Which arms no other beats in accuracy, size, latency and cost together; what was not measured beats nothing."""
    axes = _axes(arms, making, "").values()
    return pareto(
        [
            (-math.inf if math.isnan(arm.accuracy) else arm.accuracy, *(math.inf if v is None else v for v in values))
            for arm, values in zip(arms, zip(*axes, strict=True), strict=True)
        ]
    )


def _axes(arms: Sequence[Arm], making: Sequence[float | None], unit: str) -> dict[str, list[float | None]]:
    measured = {title: [_known(arm.stat(key).mean / size) for arm in arms] for key, title, size in FRONTS}
    return measured | {f"cost of making, {unit}": list(making)}


def effects(trained: Sequence[Arm]) -> list[Effect]:
    """How much each setting of a sweep matters to the runs that have it, the most first.

    None where only losses and seeds differ: the arms themselves show that.
    """
    runs = [run for arm in trained for run in arm.runs]
    accuracies = [number(run.rows["student"]["accuracy"]) or 0.0 for run in runs]
    found = []
    for setting, values in _swept(runs).items():
        had = [(value, accuracy) for value, accuracy in zip(values, accuracies, strict=True) if value is not None]
        levels = _levels(*map(list, zip(*had, strict=True)))
        if len(levels) < len(had):
            found.append(Effect(setting, explained([level.accuracies for level in levels]), levels))
    is_told = any(effect.setting not in ("loss", "seed") for effect in found)
    return sorted(found, key=lambda effect: -effect.share) if is_told else []


def _swept(runs: Sequence[Run]) -> dict[str, list[str | None]]:
    """Settings of which runs have different values; of those that tell them apart in the same way, the shortest."""
    flats = [{**run.choices, "loss": " + ".join(run.losses)} for run in runs]
    keys = sorted({key for flat in flats for key in flat}, key=lambda key: (len(key), key))
    columns = {key: [flat.get(key) for flat in flats] for key in keys}
    ways: dict[tuple[int, ...], str] = {}
    for key, values in columns.items():
        if len(set(values) - {None}) > 1:
            ways.setdefault(tuple(-1 if value is None else values.index(value) for value in values), key)
    return {key: columns[key] for key in ways.values()}


def _levels(values: Sequence[str], accuracies: Sequence[float]) -> tuple[Level, ...]:
    """The runs by value or, where most of many numbers differ as in a search, by the third of the numbers."""
    numbers = [found for value in values if (found := number(value)) is not None]
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
