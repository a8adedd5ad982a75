"""What the page draws beside the arms themselves: curves over data and size, confidence, the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from distill.arms import Arm
from distill.runs import number
from distill.statistics import Bin, PowerLaw, by_confidence, fit_power_law, pareto

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


def fronts(arms: Sequence[Arm]) -> list[Front]:
    """Accuracy over size and over latency, where two or more arms differ in it."""
    places: Mapping[int, int] = {id(arm): index for index, arm in enumerate(arm for arm in arms if arm.runs)}
    found = []
    for key, title, unit in FRONTS:
        points = [
            Point(arm.stat(key).mean / unit, arm, places.get(id(arm)))
            for arm in arms
            if arm.rows and not math.isnan(arm.stat(key).mean)
        ]
        best = pareto([(point.arm.accuracy, point.x) for point in points])
        if len({point.x for point in points}) > 1:
            found.append(Front(title, tuple(points), tuple(best)))
    return found
