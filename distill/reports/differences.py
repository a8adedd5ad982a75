"""One arm compared with another on the seeds and test examples that both have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from distill.reports.arms import Arm
from distill.reports.measures import ACCURACY, Measure, Status
from distill.reports.runs import number
from distill.reports.statistics import Interval, Matrix, detectable, family_level, paired_interval, recovered

ONE_SEED = (
    "With one seed, the interval covers the sampling of test examples, not the spread between seeds: run more seeds "
    "before you rely on it."
)


class Paired(NamedTuple):
    """Scores of two arms and correctness of the teacher on the seeds and examples that both arms share."""

    seeds: tuple[str, ...]
    ids: tuple[str, ...]
    arm: Matrix
    rival: Matrix
    teacher: Matrix | None


@dataclass(frozen=True)
class Difference:
    """One arm compared with another: paired if both have predictions (`interval`), else by their own intervals.

    `level` is that of this interval, such that the intervals of all `num_comparisons` hold together. `share` is the
    recovered share of the teacher's advantage over the rival; with `has_teacher`, None means that the teacher has no
    advantage. `overlaps` are the differences of the scores of wording that both arms have, by name.
    """

    arm: Arm
    rival: Arm
    level: float
    num_comparisons: int
    interval: Interval | None
    share: Interval | None
    has_teacher: bool
    caveats: tuple[str, ...]
    overlaps: Mapping[str, Interval] = field(default_factory=dict)

    @property
    def measure(self) -> Measure:
        """What both arms are judged by."""
        return self.arm.measure

    @property
    def points(self) -> float:
        """How much the arm's figure is above the rival's as it is shown: in percentage points, or in nats per byte."""
        return self.measure.shown(self.interval.estimate if self.interval else self.arm.score - self.rival.score)

    @property
    def is_ahead(self) -> bool:
        """Whether the arm is better than the rival, shown or not."""
        return self.measure.sign * self.points > 0

    @property
    def ends(self) -> tuple[float, float] | None:
        """Interval of the difference as it is shown; None if unpaired."""
        if self.interval is None:
            return None
        low, high = sorted(self.measure.shown(end) for end in (self.interval.low, self.interval.high))
        return low, high

    @property
    def detectable(self) -> float | None:
        """The difference, as it is shown, that this data would show with a probability of 80 %."""
        return self.measure.factor * detectable(self.interval) if self.interval else None

    @property
    def status(self) -> Status:
        """A difference is shown if its interval excludes 0; unpaired, if the arms' intervals do not overlap."""
        if self.interval:
            low, high = self.interval.low, self.interval.high
            return "better" if low > 0 else "worse" if high < 0 else "not shown"
        mine, theirs = self.arm.interval_at(self.level), self.rival.interval_at(self.level)
        above, below = mine[0] > theirs[1], mine[1] < theirs[0]
        better, worse = (above, below) if self.measure.sign > 0 else (below, above)
        return "better" if better else "worse" if worse else "not shown"

    @property
    def has_one_seed(self) -> bool:
        """Whether the difference rests on one seed alone, so that its interval leaves out the spread of seeds."""
        return (self.interval.num_seeds if self.interval else min(len(self.arm.rows), len(self.rival.rows))) == 1

    @property
    def wording(self) -> str:
        """The status for readers: an advantage in one seed alone is named as such."""
        wording = dict(self.measure.wordings)[self.status]
        return f"{wording} in one seed" if self.status == "better" and self.has_one_seed else wording


def compare(arm: Arm, rival: Arm, level: float, num_comparisons: int) -> Difference:
    """Compare two arms; `level` applies to `num_comparisons` such comparisons together."""
    paired, own_level = _paired(arm, rival), family_level(level, num_comparisons)
    if paired is None:
        caveat = f"The arms share no predictions of a seed and test example, so their own {percent(own_level)} "
        caveats = (f"{caveat}intervals are compared.", *([ONE_SEED] if 1 in (len(arm.rows), len(rival.rows)) else []))
        return Difference(arm, rival, own_level, num_comparisons, None, None, False, caveats)
    is_proportion = arm.measure is ACCURACY
    interval = paired_interval(paired.arm, paired.rival, level=own_level, is_proportion=is_proportion)
    has_teacher = paired.teacher is not None
    share = recovered(paired.rival, paired.arm, paired.teacher, level=own_level) if paired.teacher is not None else None
    limits = _limits(arm, rival, paired)
    compared = {name: _overlap(arm, rival, paired, own_level, key) for key, name in arm.measure.overlaps}
    overlaps = {name: interval for name, interval in compared.items() if interval}
    return Difference(arm, rival, own_level, num_comparisons, interval, share, has_teacher, limits, overlaps)


def _overlap(arm: Arm, rival: Arm, paired: Paired, level: float, key: str) -> Interval | None:
    sides = [
        [[number(part.predictions[seed][id_].get(key)) for id_ in paired.ids] for seed in paired.seeds]
        for part in (arm, rival)
    ]
    if any(value is None for side in sides for row in side for value in row):
        return None
    left, right = (np.array(side, np.float64) for side in sides)
    return paired_interval(left, right, level=level, is_proportion=False)


def percent(level: float) -> str:
    """Format the level of an interval."""
    return f"{100 * level:.3g} %"


def _paired(arm: Arm, rival: Arm) -> Paired | None:
    mine, theirs = arm.predictions, rival.predictions
    seeds = tuple(seed for seed in mine if mine[seed] and theirs.get(seed))
    if not seeds:
        return None
    ids = tuple(sorted(set.intersection(*(set(predictions[seed]) for predictions in (mine, theirs) for seed in seeds))))
    if not ids:
        return None
    teacher = [[mine[seed][name].get("is_teacher_correct") for name in ids] for seed in seeds]
    has_teacher = not any(value is None for row in teacher for value in row)
    left, right = arm.scores(seeds, ids), rival.scores(seeds, ids)
    return Paired(seeds, ids, left, right, np.array(teacher, np.float64) if has_teacher else None)


def _limits(arm: Arm, rival: Arm, paired: Paired) -> tuple[str, ...]:
    """State what the paired data do not cover."""
    caveats = []
    if len(paired.seeds) == 1:
        caveats.append(ONE_SEED)
    if len(paired.seeds) < max(len(arm.rows), len(rival.rows)):
        names = ", ".join(paired.seeds)
        caveats.append(f"Paired on seed {names} only: the other seeds lack predictions or a run of the other arm.")
    num_examples = arm.stat("num_examples").mean
    if len(paired.ids) < num_examples:
        caveats.append(f"Paired on {len(paired.ids)} of {num_examples:.0f} test examples: only these are in both arms.")
    return tuple(caveats)


def interval_title(differences: Sequence[Difference]) -> str:
    """Return the heading of a column of intervals, with their level."""
    return f"{'/'.join(sorted({percent(difference.level) for difference in differences})) or '95 %'} interval"
