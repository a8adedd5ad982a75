"""Steps to equal: how soon one arm has the validation loss at which another ends."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from distill.reports.arms import Arm
from distill.reports.runs import Run, number

METRICS = ("val/cross_entropy", "val/answer")  # the second is the same, for earlier runs with a loss on labels
# Settings without which a step or a loss is another thing; an answer behind a rationale is easier to predict.
COMPARABLE = ("task", "task.answer_mode", "test", "start", "batch_size")
MAX_PAIRS = 28

Curve = Sequence[tuple[float, float]]  # steps and loss of each validation


class Reached(NamedTuple):
    """The step at which a curve first has a loss; `is_bound`: already at its first validation, so at most this."""

    step: float
    is_bound: bool


class StepsToEqual(NamedTuple):
    """By seed, the steps in which `arm` has the final loss of `rival`, over the steps of the rival.

    A ratio is None if the arm never has that loss. `is_bound`: some ratios are upper bounds.
    """

    arm: Arm
    rival: Arm
    ratios: Mapping[str, float | None]
    is_bound: bool

    @property
    def text(self) -> str:
        """The mean of the ratios with their standard deviation, and in how many seeds the loss was not reached."""
        known = [ratio for ratio in self.ratios.values() if ratio is not None]
        missing = len(self.ratios) - len(known)
        if not known:
            return "not reached"
        spread = f" ± {statistics.stdev(known):.2f}" if len(known) > 1 else ""
        unreached = f", not reached in {missing} of {len(self.ratios)} seeds" if missing else ""
        return f"{'at most ' if self.is_bound else ''}{statistics.fmean(known):.2f}{spread}{unreached}"


def first_reach(curve: Curve, loss: float) -> Reached | None:
    """Return when a curve first is at most at a loss, on straight lines between validations."""
    if curve and curve[0][1] <= loss:
        return Reached(curve[0][0], True)
    for (step, before), (later, after) in itertools.pairwise(curve):
        if after <= loss:
            return Reached(step + (later - step) * (before - loss) / (before - after), False)
    return None


def steps_to_equal(arms: Sequence[Arm]) -> list[StepsToEqual]:
    """Compare each pair of trained arms with comparable curves: the one that ends lower with the other one's end.

    Of many pairs, those with labels alone are left.
    """
    pairs = _all_pairs(arms)
    return pairs if len(pairs) <= MAX_PAIRS else [pair for pair in pairs if _has_baseline(pair)]


def pairs_note(arms: Sequence[Arm]) -> list[str]:
    """Say how many pairs are left out of the table of steps, if any are."""
    pairs, shown = _all_pairs(arms), steps_to_equal(arms)
    if len(shown) == len(pairs):
        return []
    return [
        f"Steps to equal: of {len(pairs)} pairs of arms, the {len(pairs) - len(shown)} without an arm that learns from "
        f"labels alone are left out, because there are more than {MAX_PAIRS}; report on fewer arms to see all."
    ]


def _all_pairs(arms: Sequence[Arm]) -> list[StepsToEqual]:
    compared = (
        _compared(one, other)
        for one, other in itertools.combinations((arm for arm in arms if arm.runs), 2)
        if all(one.settings.get(key) == other.settings.get(key) for key in COMPARABLE)
    )
    return [pair for pair in compared if pair]


def _has_baseline(pair: StepsToEqual) -> bool:
    return "baseline" in (pair.arm.kind, pair.rival.kind)


def _compared(one: Arm, other: Arm) -> StepsToEqual | None:
    """Return the pair in its direction, on the seeds that both arms have a curve for; None without any."""
    for metric in METRICS:
        curves = (
            {run.seed: _curve(run, metric) for run in one.runs},
            {run.seed: _curve(run, metric) for run in other.runs},
        )
        seeds = [seed for seed, curve in curves[0].items() if curve and curves[1].get(seed)]
        if seeds:
            left, right = ({seed: part[seed] for seed in seeds} for part in curves)
            is_turned = _end(left) > _end(right)
            return _ratios(other, one, right, left) if is_turned else _ratios(one, other, left, right)
    return None


def _end(curves: Mapping[str, Curve]) -> float:
    return statistics.fmean(curve[-1][1] for curve in curves.values())


def _ratios(arm: Arm, rival: Arm, mine: Mapping[str, Curve], theirs: Mapping[str, Curve]) -> StepsToEqual:
    reached = {seed: first_reach(mine[seed], curve[-1][1]) for seed, curve in theirs.items()}
    ratios = {seed: place.step / theirs[seed][-1][0] if place else None for seed, place in reached.items()}
    return StepsToEqual(arm, rival, ratios, any(place is not None and place.is_bound for place in reached.values()))


def _curve(run: Run, metric: str) -> Curve:
    """Return the validations of a run in order of steps; a metric is logged at the index of the last step."""
    points = [(number(line.get("step")), number(line.get(metric))) for line in run.metrics]
    return sorted((step + 1, loss) for step, loss in points if step is not None and loss is not None)
