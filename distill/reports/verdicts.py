"""Judge each distilled arm against labels alone: better, worse or not shown, and by how much.

A verdict rests on the difference of two arms, paired by seed and by test example, and claims a difference only if
its interval excludes 0. With several distilled arms, the level of each interval is raised so that all hold together.
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
MAX_CONTRASTS = 28  # each then has a 99.8 % interval
NOT_SHOWN = " This does not show that the student is better."
NO_ADVANTAGE = "The teacher is no better than labels alone."
ONE_SEED = "With one seed, the interval covers the sampling of test examples, not the spread between seeds."

Status = Literal["better", "not shown", "worse"]


class Paired(NamedTuple):
    """Correctness of two arms and of the teacher on the seeds and examples that both arms share."""

    seeds: tuple[str, ...]
    ids: tuple[str, ...]
    arm: Matrix
    rival: Matrix
    teacher: Matrix | None


@dataclass(frozen=True)
class Difference:
    """One arm compared with another: paired if both have predictions (`interval`), else by their own intervals.

    `share` is the recovered share of the teacher's advantage over the rival; with `has_teacher`, None means that
    the teacher has no advantage.
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
        """Percentage points by which the arm is above the rival."""
        return 100 * (self.interval.estimate if self.interval else self.arm.accuracy - self.rival.accuracy)

    @property
    def ends(self) -> tuple[float, float] | None:
        """Interval of the difference in percentage points; None if unpaired."""
        return (100 * self.interval.low, 100 * self.interval.high) if self.interval else None

    @property
    def detectable(self) -> float | None:
        """The difference in points that this data would show with a probability of 80 %."""
        return 100 * detectable(self.interval) if self.interval else None

    @property
    def status(self) -> Status:
        """A difference is shown if its interval excludes 0; unpaired, if the arms' intervals do not overlap."""
        if self.ends:
            low, high = self.ends
            return "better" if low > 0 else "worse" if high < 0 else "not shown"
        mine, theirs = self.arm.interval, self.rival.interval
        return "better" if mine[0] > theirs[1] else "worse" if mine[1] < theirs[0] else "not shown"


@dataclass(frozen=True)
class Verdict:
    """Whether one distilled arm beat labels alone.

    `over_hard_labels` compares it with hard labels from the same teacher, if an arm with the same budget had them.
    """

    arm: Arm
    status: Literal["better", "not shown", "worse", "no baseline", "not compared"]
    sentence: str
    caveats: tuple[str, ...] = ()
    difference: Difference | None = None
    over_hard_labels: Difference | None = None

    @property
    def points(self) -> float | None:
        """Difference from labels alone in percentage points."""
        return self.difference.points if self.difference else None


@dataclass(frozen=True)
class Contrast:
    """Two arms with the same losses and task whose configurations differ in one section (`change`)."""

    losses: str
    change: str
    difference: Difference


@dataclass(frozen=True)
class Summary:
    """Content of the report: arms in the order of the table, a verdict for each distilled arm.

    `contrasts` has each pair of arms that differ in one section, or none if there are more than `MAX_CONTRASTS`.
    """

    runs: tuple[Run, ...]
    arms: tuple[Arm, ...]
    verdicts: tuple[Verdict, ...]
    contrasts: tuple[Contrast, ...]
    notes: tuple[str, ...]

    @property
    def trained(self) -> tuple[Arm, ...]:
        """The trained arms, baselines first."""
        return tuple(arm for arm in self.arms if arm.runs)

    @property
    def seeds(self) -> tuple[Arm, ...]:
        """Each trained run as a separate arm."""
        return tuple(seed for arm in self.trained for seed in arm.seeds)


def summarise(runs: Sequence[Run], level: float = 0.95) -> Summary:
    """Group finished runs into arms and judge each distilled arm; `level` applies to all verdicts together."""
    notes = [f"{run.name}: {problem}" for run in runs for problem in run.problems]
    notes += [f"{run.name} is incomplete: it has no results" for run in runs if not run.is_complete]
    arms = group([run for run in runs if run.is_complete], notes)
    distilled = [arm for arm in arms if arm.kind == "distilled"]
    rivals = [_rival(arm, arms) for arm in distilled]
    num_arms = sum(rival is not None for rival in rivals)
    verdicts = [_judge(arm, rival, arms, level, num_arms) for arm, rival in zip(distilled, rivals, strict=True)]
    contrasts = _contrasts(arms, level, notes)
    return Summary(tuple(runs), tuple(arms), tuple(verdicts), contrasts, tuple(notes))


def _contrasts(arms: Sequence[Arm], level: float, notes: list[str]) -> tuple[Contrast, ...]:
    """Compare each pair of arms that differ in one section; if there are too many pairs, add a note instead."""
    pairs = []
    for rival, arm in combinations((arm for arm in arms if arm.runs), 2):
        is_comparable = arm.losses == rival.losses and all(
            arm.settings[key] == rival.settings[key] for key in ("task", "test")
        )
        ours, theirs = arm.choices, rival.choices
        changed = [key for key in {**ours, **theirs} if ours.get(key, NULL) != theirs.get(key, NULL)]
        if is_comparable and len({key.partition(".")[0] for key in changed}) == 1:
            pairs.append((arm, rival, _change(arm, rival, changed)))
    if len(pairs) > MAX_CONTRASTS:
        notes.append(f"{len(pairs)} pairs of arms differ in one section of the configuration: too many to compare.")
        return ()
    return tuple(
        Contrast(" + ".join(arm.losses), change, compare(arm, rival, level, len(pairs))) for arm, rival, change in pairs
    )


def _change(arm: Arm, rival: Arm, keys: Sequence[str]) -> str:
    """Describe how the arm's settings differ from the rival's; names the first two."""
    mine = [f"{key}={visible(arm.choices.get(key, 'none'), 24)}" for key in keys]
    theirs = [visible(rival.choices.get(key, "none"), 24) for key in keys]
    changes = [f"{new}, not {old}" for new, old in zip(mine, theirs, strict=True)]
    rest = f"; and {len(changes) - 2} more" if len(changes) > 2 else ""
    return "; ".join(changes[:2]) + rest


def _peers(arm: Arm, arms: Sequence[Arm]) -> list[Arm]:
    """Return the other trained arms with the same task and budget."""
    return [other for other in arms if other.runs and other is not arm and not _differing(arm, other)]


def _differing(arm: Arm, other: Arm) -> list[str]:
    return [key for key in ("task", *BUDGET) if arm.settings[key] != other.settings[key]]


def _baselines(arms: Sequence[Arm]) -> list[Arm]:
    return [arm for arm in arms if arm.kind == "baseline" and arm.runs]


def _rival(arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """Return the best arm on labels alone with the same budget."""
    return max(_peers(arm, _baselines(arms)), key=lambda other: other.accuracy, default=None)


def _judge(arm: Arm, rival: Arm | None, arms: Sequence[Arm], level: float, num_arms: int) -> Verdict:
    caveats = [
        f"The student is no better than before training ({100 * before.accuracy:.1f} %)."
        for before in arms
        if before.kind == "before"
        and before.settings.items() <= arm.settings.items()
        and arm.accuracy <= before.accuracy
    ]
    if rival is None:
        return _not_compared(arm, _baselines(arms), caveats)
    difference = compare(arm, rival, level, num_arms)
    caveats += difference.caveats
    if (number := len(_peers(arm, _baselines(arms)))) > 1:
        caveats.append(f"{number} baselines have this budget; the arm is compared with the best.")
    hard = [] if arm.has_hard_labels else [other for other in _peers(arm, arms) if other.has_hard_labels]
    over_hard_labels = compare(arm, max(hard, key=lambda other: other.accuracy), level, num_arms) if hard else None
    return Verdict(arm, difference.status, _sentence(difference), tuple(caveats), difference, over_hard_labels)


def _not_compared(arm: Arm, baselines: Sequence[Arm], caveats: list[str]) -> Verdict:
    differing = {id(other): _differing(arm, other) for other in baselines}
    rivals = [other for other in baselines if "task" not in differing[id(other)]]
    if not rivals:
        lead = f"{arm.label}: no baseline was run, so the report cannot say whether distillation helped."
        return Verdict(arm, "no baseline", lead, (f"To run the baseline: {BASELINE_COMMAND}", *caveats))
    rival = min(rivals, key=lambda other: len(differing[id(other)]))
    terms = [f"{key} {arm.settings[key][:16]} versus {rival.settings[key][:16]}" for key in differing[id(rival)]]
    lead = f"{arm.label}: not compared with labels alone, because the budgets differ ({', '.join(terms)})."
    return Verdict(arm, "not compared", lead, tuple(caveats))


def compare(arm: Arm, rival: Arm, level: float, num_arms: int) -> Difference:
    """Compare two arms; `level` applies to `num_arms` such comparisons together."""
    paired, own_level = _paired(arm, rival), family_level(level, num_arms)
    if paired is None:
        caveat = "The arms share no predictions of a seed and test example, so their own 95 % intervals are compared."
        caveats = (caveat, *([ONE_SEED] if min(len(arm.rows), len(rival.rows)) == 1 else []))
        return Difference(arm, rival, own_level, num_arms, None, None, False, caveats)
    interval = paired_interval(paired.arm, paired.rival, level=own_level)
    has_teacher = paired.teacher is not None
    share = recovered(paired.rival, paired.arm, paired.teacher, level=own_level) if paired.teacher is not None else None
    return Difference(arm, rival, own_level, num_arms, interval, share, has_teacher, _limits(arm, rival, paired))


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
    left, right = (
        np.array([[predictions[seed][name]["is_correct"] is True for name in ids] for seed in seeds], np.float64)
        for predictions in (mine, theirs)
    )
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


def _sentence(difference: Difference) -> str:
    arm, points = difference.arm, difference.points
    claim = f"{abs(points):.1f} points {'above' if points > 0 else 'below'} labels alone at equal budget"
    claim += f" ({cell(arm, COLUMNS[0])} versus {cell(difference.rival, COLUMNS[0])})"
    is_shown = difference.status != "not shown"
    lead = f"{arm.label} is {difference.status}: {claim}" if is_shown else f"{arm.label}: {claim}"
    doubt = "" if is_shown else NOT_SHOWN if points > 0 else " The student is not better."
    basis = _pairing(difference) if difference.interval else _unpaired(difference)
    return f"{lead}{basis}{doubt}{_power(difference)}{_share(difference)}"


def _unpaired(difference: Difference) -> str:
    if difference.status != "not shown":
        return ". The 95 % intervals do not overlap."
    is_missing = math.isnan(difference.arm.interval[0] + difference.rival.interval[0])
    return f", but {'an interval is missing' if is_missing else 'the 95 % intervals overlap'}."


def _pairing(difference: Difference) -> str:
    """State the interval, its level and the pairing."""
    assert difference.interval is not None
    assert difference.ends is not None
    (low, high), seeds = difference.ends, difference.interval.num_seeds
    by = f"{seeds} seeds and " if seeds > 1 else ""
    by += f"{difference.interval.num_examples} test examples"
    level, number = f"{100 * difference.level:.3g} %", difference.num_arms
    joint = f"{100 * (1 - number * (1 - difference.level)):.3g} %"
    family = f"; {level} for each of the {number} arms, so {joint} for all together" if number > 1 else ""
    includes = ", which includes 0" if difference.status == "not shown" else ""
    lead = f". The {level} interval of the difference is {low:+.1f} to {high:+.1f} points{includes}"
    return f"{lead} (paired by {by}{family})."


def _power(difference: Difference) -> str:
    if difference.status != "not shown" or not difference.detectable:  # 0: the arms never differ
        return ""
    return f" This data would show a true difference of {difference.detectable:.1f} points four times out of five."


def _share(difference: Difference) -> str:
    if not difference.has_teacher:
        return ""
    text = share_text(difference)
    return f" {text}" if difference.share is None else f" It recovers {text} of the teacher's advantage."


def share_text(difference: Difference) -> str:
    """Format the recovered share of the teacher's advantage with its interval."""
    share = difference.share
    if share is None:
        return NO_ADVANTAGE if difference.has_teacher else "not measured"
    ends = "unbounded"
    if math.isfinite(share.low + share.high):
        ends = f"{100 * share.low:.0f}, {100 * share.high:.0f}"
    return f"{100 * share.estimate:.0f} % [{ends}]"
