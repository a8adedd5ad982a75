"""Arms to verdicts: whether each distilled arm beat the labels alone, and by how much.

The verdict rests on the difference of two arms, paired by seed and by test example, and claims one only where its
interval excludes 0. With several distilled arms each interval is drawn at the level at which all hold together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np

from distill.app.console import visible
from distill.reports.arms import BUDGET, COLUMNS, Arm, cell, group
from distill.reports.runs import NULL, Run
from distill.reports.statistics import Interval, Matrix, detectable, family_level, paired_interval, recovered

BASELINE_COMMAND = "python -m distill.train 'loss=[answer]'"
MOST_CONTRASTS = 28  # of which each is held to 99.8 %
NO_ADVANTAGE = "The teacher is no better than labels alone."

Status = Literal["better", "not shown", "worse"]


class Paired(NamedTuple):
    """Correctness of two arms and of the teacher on the seeds and examples that both arms have."""

    seeds: tuple[str, ...]
    ids: tuple[str, ...]
    arm: Matrix
    rival: Matrix
    teacher: Matrix | None


@dataclass(frozen=True)
class Difference:
    """One arm against another: paired where both tell their predictions (`interval`), else by their own intervals.

    `share` is of the teacher's advantage over the rival. Its None stands for no advantage where `has_teacher`.
    """

    arm: Arm
    rival: Arm
    level: float
    num_arms: int
    interval: Interval | None
    share: Interval | None
    has_teacher: bool
    caveats: tuple[str, ...]

    @property
    def points(self) -> float:
        """The arm above the rival, in percentage points."""
        return 100 * (self.interval.estimate if self.interval else self.arm.accuracy - self.rival.accuracy)

    @property
    def ends(self) -> tuple[float, float] | None:
        """The interval of the difference in percentage points, where it is paired."""
        return (100 * self.interval.low, 100 * self.interval.high) if self.interval else None

    @property
    def detectable(self) -> float | None:
        """The difference in points that this data would have shown four times out of five."""
        return 100 * detectable(self.interval) if self.interval else None

    @property
    def status(self) -> Status:
        """A difference is claimed where its interval excludes 0; unpaired, where the arms' intervals are apart."""
        if self.ends:
            low, high = self.ends
            return "better" if low > 0 else "worse" if high < 0 else "not shown"
        mine, theirs = self.arm.interval, self.rival.interval
        return "better" if mine[0] > theirs[1] else "worse" if mine[1] < theirs[0] else "not shown"


@dataclass(frozen=True)
class Verdict:
    """Whether one distilled arm beat the labels alone; `points` is the difference in percentage points.

    `beside` sets the arm against hard labels from the same teacher, where an arm had them at equal budget.
    """

    arm: Arm
    status: Literal["better", "not shown", "worse", "no baseline", "not compared"]
    sentence: str
    caveats: tuple[str, ...] = ()
    difference: Difference | None = None
    beside: Difference | None = None

    @property
    def points(self) -> float | None:
        """The difference in percentage points."""
        return self.difference.points if self.difference else None


@dataclass(frozen=True)
class Contrast:
    """Two arms of the same losses and the same task whose choices differ in one section: what that changed."""

    losses: str
    choice: str
    difference: Difference


@dataclass(frozen=True)
class Summary:
    """All that the report says: arms in the order of the table, a verdict for each distilled arm.

    There is a contrast for each two arms that are one choice apart, unless so many that no difference could be shown.
    """

    runs: tuple[Run, ...]
    arms: tuple[Arm, ...]
    verdicts: tuple[Verdict, ...]
    contrasts: tuple[Contrast, ...]
    notes: tuple[str, ...]

    @property
    def trained(self) -> tuple[Arm, ...]:
        """The arms that were trained, the baseline first."""
        return tuple(arm for arm in self.arms if arm.runs)

    @property
    def seeds(self) -> tuple[Arm, ...]:
        """Each trained run as an arm of its own."""
        return tuple(seed for arm in self.trained for seed in arm.seeds)


def summarise(runs: Sequence[Run], level: float = 0.95) -> Summary:
    """Group the finished runs into arms and judge each distilled arm; `level` is that of all verdicts together."""
    notes = [f"{run.name}: {problem}" for run in runs for problem in run.problems]
    notes += [f"{run.name} is incomplete: it has no result" for run in runs if not run.is_complete]
    arms = group([run for run in runs if run.is_complete], notes)
    distilled = [arm for arm in arms if arm.kind == "distilled"]
    rivals = [_rival(arm, arms) for arm in distilled]
    num_arms = sum(rival is not None for rival in rivals)
    verdicts = [_judge(arm, rival, arms, level, num_arms) for arm, rival in zip(distilled, rivals, strict=True)]
    contrasts = _contrasts(arms, level, notes)
    return Summary(tuple(runs), tuple(arms), tuple(verdicts), contrasts, tuple(notes))


def _contrasts(arms: Sequence[Arm], level: float, notes: list[str]) -> tuple[Contrast, ...]:
    """Each two arms that are one choice apart; that they are too many to show anything is added to `notes`."""
    found = []
    for rival, arm in combinations((arm for arm in arms if arm.runs), 2):
        same = arm.losses == rival.losses and all(arm.settings[key] == rival.settings[key] for key in ("task", "test"))
        ours, theirs = arm.choices, rival.choices
        chosen = [key for key in {**ours, **theirs} if ours.get(key, NULL) != theirs.get(key, NULL)]
        if same and len({key.partition(".")[0] for key in chosen}) == 1:
            found.append((arm, rival, _choice(arm, rival, chosen)))
    if len(found) > MOST_CONTRASTS:
        notes.append(f"{len(found)} pairs of arms are one choice apart: too many to be held against each other.")
        return ()
    return tuple(
        Contrast(" + ".join(arm.losses), choice, compare(arm, rival, level, len(found))) for arm, rival, choice in found
    )


def _choice(arm: Arm, rival: Arm, keys: Sequence[str]) -> str:
    """In words, from the rival's to the arm's; of many settings of a section the first."""
    told = [f"{key}={visible(arm.choices.get(key, 'none'), 24)}" for key in keys]
    instead = [visible(rival.choices.get(key, "none"), 24) for key in keys]
    pairs = [f"{mine}, not {theirs}" for mine, theirs in zip(told, instead, strict=True)]
    rest = f"; and {len(pairs) - 2} more" if len(pairs) > 2 else ""
    return "; ".join(pairs[:2]) + rest


def _equals(arm: Arm, arms: Sequence[Arm]) -> list[Arm]:
    """The other trained arms of the same task and budget."""
    return [other for other in arms if other.runs and other is not arm and not _unlike(arm, other)]


def _unlike(arm: Arm, other: Arm) -> list[str]:
    return [key for key in ("task", *BUDGET) if arm.settings[key] != other.settings[key]]


def _baselines(arms: Sequence[Arm]) -> list[Arm]:
    return [arm for arm in arms if arm.kind == "baseline" and arm.runs]


def _rival(arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """The best arm on labels alone at equal budget."""
    return max(_equals(arm, _baselines(arms)), key=lambda other: other.accuracy, default=None)


def _judge(arm: Arm, rival: Arm | None, arms: Sequence[Arm], level: float, num_arms: int) -> Verdict:
    caveats = [
        f"The student is not better than before training ({100 * start.accuracy:.1f} %)."
        for start in arms
        if start.kind == "before" and start.settings.items() <= arm.settings.items() and arm.accuracy <= start.accuracy
    ]
    if rival is None:
        return _not_compared(arm, _baselines(arms), caveats)
    difference = compare(arm, rival, level, num_arms)
    caveats += difference.caveats
    if (number := len(_equals(arm, _baselines(arms)))) > 1:
        caveats.append(f"{number} baselines had this budget; the best of them is taken.")
    hard = [] if arm.has_hard_labels else [other for other in _equals(arm, arms) if other.has_hard_labels]
    beside = compare(arm, max(hard, key=lambda other: other.accuracy), level, num_arms) if hard else None
    return Verdict(arm, difference.status, _sentence(difference), tuple(caveats), difference, beside)


def _not_compared(arm: Arm, baselines: Sequence[Arm], caveats: list[str]) -> Verdict:
    unlike = {id(other): _unlike(arm, other) for other in baselines}
    rivals = [other for other in baselines if "task" not in unlike[id(other)]]
    if not rivals:
        lead = f"{arm.label}: no baseline was run, so nothing can be said about whether distillation helped."
        return Verdict(arm, "no baseline", lead, (f"To run it: {BASELINE_COMMAND}", *caveats))
    rival = min(rivals, key=lambda other: len(unlike[id(other)]))
    terms = [f"{key} {arm.settings[key][:16]} against {rival.settings[key][:16]}" for key in unlike[id(rival)]]
    lead = f"{arm.label}: not compared with labels alone, because the budgets differ ({', '.join(terms)})."
    return Verdict(arm, "not compared", lead, tuple(caveats))


def compare(arm: Arm, rival: Arm, level: float, num_arms: int) -> Difference:
    """The difference of two arms, as one of `num_arms` that are to hold together with `level`."""
    paired, each = _paired(arm, rival), family_level(level, num_arms)
    if paired is None:
        caveat = "No seed and test example has predictions of both arms: the arms' own 95 % intervals are compared."
        few = ["With one seed the interval holds test sampling only, not the spread between seeds."]
        caveats = (caveat, *(few if min(len(arm.rows), len(rival.rows)) == 1 else []))
        return Difference(arm, rival, each, num_arms, None, None, False, caveats)
    interval = paired_interval(paired.arm, paired.rival, level=each)
    has_teacher = paired.teacher is not None
    share = recovered(paired.rival, paired.arm, paired.teacher, level=each) if paired.teacher is not None else None
    return Difference(arm, rival, each, num_arms, interval, share, has_teacher, _limits(arm, rival, paired))


def _paired(arm: Arm, rival: Arm) -> Paired | None:
    mine, theirs = arm.predictions, rival.predictions
    seeds = tuple(seed for seed in mine if mine[seed] and theirs.get(seed))
    if not seeds:
        return None
    ids = tuple(sorted(set.intersection(*(set(told[seed]) for told in (mine, theirs) for seed in seeds))))
    if not ids:
        return None
    teacher = [[mine[seed][name].get("is_teacher_correct") for name in ids] for seed in seeds]
    is_told = not any(value is None for row in teacher for value in row)
    left, right = (
        np.array([[told[seed][name]["is_correct"] is True for name in ids] for seed in seeds], np.float64)
        for told in (mine, theirs)
    )
    return Paired(seeds, ids, left, right, np.array(teacher, np.float64) if is_told else None)


def _limits(arm: Arm, rival: Arm, paired: Paired) -> tuple[str, ...]:
    """What a reader must know of what the pairs do not hold."""
    said = []
    if len(paired.seeds) == 1:
        said.append("With one seed the interval holds test sampling only, not the spread between seeds.")
    if len(paired.seeds) < max(len(arm.rows), len(rival.rows)):
        names = ", ".join(paired.seeds)
        said.append(f"Paired on seed {names} alone: the other seeds lack predictions or a partner.")
    num_examples = arm.stat("num_examples").mean
    if len(paired.ids) < num_examples:
        said.append(
            f"Paired on {len(paired.ids)} of {num_examples:.0f} test examples: no others are told by both arms."
        )
    return tuple(said)


def _sentence(difference: Difference) -> str:
    arm, points = difference.arm, difference.points
    where = f"{abs(points):.1f} points {'above' if points > 0 else 'below'} labels alone at equal budget"
    where += f" ({cell(arm, COLUMNS[0])} against {cell(difference.rival, COLUMNS[0])})"
    is_shown = difference.status != "not shown"
    lead = f"{arm.label} is {difference.status}: {where}" if is_shown else f"{arm.label}: {where}"
    end = (
        ""
        if is_shown
        else " It is not shown that the student is better."
        if points > 0
        else " The student is not better."
    )
    ground = _ground(difference) if difference.interval else _unpaired(difference)
    return f"{lead}{ground}{end}{_power(difference)}{_share(difference)}"


def _unpaired(difference: Difference) -> str:
    if difference.status != "not shown":
        return ". The 95 % intervals do not overlap."
    is_missing = math.isnan(difference.arm.interval[0] + difference.rival.interval[0])
    return f", but {'an interval is missing' if is_missing else 'the 95 % intervals overlap'}."


def _ground(difference: Difference) -> str:
    """The interval, what it is paired by, and its level."""
    assert difference.interval is not None
    assert difference.ends is not None
    (low, high), seeds = difference.ends, difference.interval.num_seeds
    by = f"by {seeds} seeds and {difference.interval.num_examples} test examples"
    by = by if seeds > 1 else by.replace(f"{seeds} seeds and ", "")
    level, number = f"{100 * difference.level:.3g} %", difference.num_arms
    whole = f"{100 * (1 - number * (1 - difference.level)):.3g} %"
    together = f"; {level} for each of the {number} arms is {whole} for all together" if number > 1 else ""
    holds = ", which holds 0" if difference.status == "not shown" else ""
    lead = f". The {level} interval of the difference is {low:+.1f} to {high:+.1f} points{holds}"
    return f"{lead} (paired {by}{together})."


def _power(difference: Difference) -> str:
    if difference.status != "not shown" or not difference.detectable:  # none, where two arms are alike in all
        return ""
    return f" This data would have shown a difference of {difference.detectable:.1f} points or more."


def _share(difference: Difference) -> str:
    if not difference.has_teacher:
        return ""
    text = share_text(difference)
    return f" {text}" if difference.share is None else f" It recovers {text} of the teacher's advantage."


def share_text(difference: Difference) -> str:
    """Share of the teacher's advantage that was recovered, with its interval."""
    share = difference.share
    if share is None:
        return NO_ADVANTAGE if difference.has_teacher else "not measured"
    ends = "unbounded"
    if math.isfinite(share.low + share.high):
        ends = f"{100 * share.low:.0f}, {100 * share.high:.0f}"
    return f"{100 * share.estimate:.0f} % [{ends}]"
