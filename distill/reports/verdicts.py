"""Judge each distilled arm against labels alone and against the teacher's answers alone, and by how much.

Without any labels, the teacher's answers alone are the baseline.

A verdict rests on the difference of two arms, paired by seed and by test example, and claims a difference only if
its interval excludes 0. The intervals of all verdicts are one family: the level of each is such that all hold together.
Arms that do no better than guessing, or that are all right everywhere, have a verdict of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from distill.reports.arms import BUDGET, MAIN_COLUMNS, Arm, cell, group
from distill.reports.baseline import baseline_command
from distill.reports.classes import Guess, best_guess, guesses
from distill.reports.contrasts import Contrast, contrasts
from distill.reports.differences import Difference, compare, percent
from distill.reports.folds import join_folds
from distill.reports.latency import share_latencies
from distill.reports.measures import ACCURACY
from distill.reports.runs import Run
from distill.reports.words import against_words, sentence

NOT_SHOWN = " This does not show that the student is better."
NO_ADVANTAGE = "The teacher is no better than labels alone."
TO_RUN = "To run the baseline: "  # a command follows, up to the end
NO_GUESS = Guess("guessing", 0.0)  # where the test's answers are unknown or all the same

Status = Literal["better", "not shown", "worse", "not learned", "all right", "no baseline", "not compared"]


class Rivals(NamedTuple):
    """What a distilled arm is compared with: the baseline, and the teacher's answers alone, at the same budget."""

    baseline: Arm | None
    hard_labels: Arm | None


@dataclass(frozen=True)
class Verdict:
    """Whether one distilled arm beat the baseline, which is labels alone or, without any, the teacher's answers.

    `over_hard_labels` compares it with hard labels from the same teacher, if an arm with the same budget had them, and
    `over_words` with a bag of words on the same targets.
    An arm that is worse than either is worse. "Not learned": neither it nor the baseline beat guessing; "all right":
    both answer everything right.
    """

    arm: Arm
    status: Status
    sentence: str
    caveats: tuple[str, ...] = ()
    difference: Difference | None = None
    over_hard_labels: Difference | None = None
    over_words: Difference | None = None

    @property
    def points(self) -> float | None:
        """Difference from the baseline as it is shown, such as in percentage points."""
        return self.difference.points if self.difference else None

    @property
    def is_worse_than_hard_labels(self) -> bool:
        """Whether the arm is worse than the teacher's answers alone, and that decides its verdict."""
        hard, labels = self.over_hard_labels, self.difference
        is_worse = hard is not None and hard.status == "worse"  # which makes the verdict "worse"
        return is_worse and (labels is None or labels.status != "worse")

    @property
    def is_preliminary(self) -> bool:
        """Whether the arm is better in one seed alone."""
        return self.status == "better" and self.difference is not None and self.difference.has_one_seed

    @property
    def wording(self) -> str:
        """The status for readers."""
        if self.is_worse_than_hard_labels:
            return "worse than the teacher's answers alone"
        return self.difference.wording if self.difference and self.status in ("better", "worse") else self.status

    @property
    def deciding(self) -> Difference | None:
        """The difference that the status rests on."""
        return self.over_hard_labels if self.is_worse_than_hard_labels else self.difference


@dataclass(frozen=True)
class Summary:
    """Content of the report: arms in the order of the table, a verdict for each distilled arm.

    `contrasts` has each pair of arms that differ in one section, or none if there are too many, and `words` the
    comparison of each trained arm with its bag of words.
    """

    runs: tuple[Run, ...]
    arms: tuple[Arm, ...]
    verdicts: tuple[Verdict, ...]
    contrasts: tuple[Contrast, ...]
    words: tuple[Difference, ...]
    notes: tuple[str, ...]

    @property
    def trained(self) -> tuple[Arm, ...]:
        """The trained arms, baselines first."""
        return tuple(arm for arm in self.arms if arm.runs)

    @property
    def guesses(self) -> tuple[Guess, ...]:
        """Ways to answer without reading the question; with several tasks, the task is named."""
        tests: dict[tuple[str | None, ...], list[Arm]] = {}
        for arm in self.trained:
            tests.setdefault(tuple(arm.settings.get(key) for key in ("task", "test")), []).append(arm)
        names = [f"{test[0]}: " if len(tests) > 1 else "" for test in tests]
        named = [(name, guess) for name, arms in zip(names, tests.values(), strict=True) for guess in guesses(arms)]
        return tuple(Guess(f"{name}{guess.label}", guess.accuracy) for name, guess in named)

    @property
    def seeds(self) -> tuple[Arm, ...]:
        """Each trained run as a separate arm."""
        return tuple(seed for arm in self.trained for seed in arm.seeds)


def summarise(runs: Sequence[Run], level: float = 0.95) -> Summary:
    """Group finished runs into arms and judge each distilled arm; `level` applies to all verdicts together."""
    runs = share_latencies(runs)
    notes = [f"{run.name}: {problem}" for run in runs for problem in run.problems]
    notes += [f"{run.name} is incomplete: it has no results" for run in runs if not run.is_complete]
    arms = group(join_folds([run for run in runs if run.is_complete], notes), notes)
    distilled = [arm for arm in arms if arm.kind == "distilled"]
    rivals = [_rivals(arm, arms) for arm in distilled]
    number = sum(rival is not None for pair in rivals if pair.baseline for rival in pair)
    words = against_words(arms, level)
    verdicts = [
        _with_words(_judge(arm, pair, arms, level, number), words) for arm, pair in zip(distilled, rivals, strict=True)
    ]
    return Summary(tuple(runs), tuple(arms), tuple(verdicts), contrasts(arms, level, notes), words, tuple(notes))


def _with_words(verdict: Verdict, words: Sequence[Difference]) -> Verdict:
    """Add the comparison with the bag of words: to the sentence or, if the arm is not better, to the caveats."""
    over_words = next((difference for difference in words if difference.arm is verdict.arm), None)
    if over_words is None:
        return verdict
    if over_words.status == "better":
        return replace(verdict, over_words=over_words, sentence=f"{verdict.sentence} {sentence(over_words)}")
    return replace(verdict, over_words=over_words, caveats=(sentence(over_words), *verdict.caveats))


def _peers(arm: Arm, arms: Sequence[Arm]) -> list[Arm]:
    """Return the other trained arms with the same task and budget."""
    return [other for other in arms if other.runs and other is not arm and not _differing(arm, other)]


def _differing(arm: Arm, other: Arm) -> list[str]:
    return [key for key in ("task", *BUDGET) if arm.settings[key] != other.settings[key]]


def _baselines(arms: Sequence[Arm]) -> list[Arm]:
    return [arm for arm in arms if arm.kind == "baseline" and arm.runs]


def _rivals(arm: Arm, arms: Sequence[Arm]) -> Rivals:
    """Return the best baseline, and the best arm on the teacher's answers alone beside labels, with the same budget."""
    has_own = arm.has_hard_labels or not arm.has_labels
    hard = [] if has_own else [other for other in _peers(arm, arms) if other.has_hard_labels]
    return Rivals(_best(_peers(arm, _baselines(arms))), _best(hard))


def _best(arms: Sequence[Arm]) -> Arm | None:
    return max(arms, key=lambda arm: arm.score, default=None)


def _judge(arm: Arm, rivals: Rivals, arms: Sequence[Arm], level: float, number: int) -> Verdict:
    caveats = [
        f"The student is no better than before training ({arm.measure.text(before.stat(arm.measure.key).mean)})."
        for before in arms
        if before.kind == "before" and before.settings.items() <= arm.settings.items() and arm.score <= before.score
    ]
    if rivals.baseline is None:
        return _not_compared(arm, _baselines(arms), caveats)
    difference, hard = (compare(arm, rival, level, number) if rival else None for rival in rivals)
    assert difference is not None
    guess = best_guess([arm]) or NO_GUESS
    status = _status(difference, hard, guess.accuracy)
    caveats += difference.caveats
    if status != "not learned" and not _beats(arm, guess.accuracy):
        caveats.append(f"The student is not shown to be better than {_described(guess)}.")
    if (num_baselines := len(_peers(arm, _baselines(arms)))) > 1:
        caveats.append(f"{num_baselines} baselines have this budget; the arm is compared with the best.")
    sentence = _sentence(difference, status, guess) + (_over_hard_labels(hard) if hard else "")
    return Verdict(arm, status, sentence, tuple(caveats), difference, hard)


def _status(difference: Difference, hard: Difference | None, guess: float) -> Status:
    if hard and hard.status == "worse":
        return "worse"
    arms = (difference.arm, difference.rival)
    is_below = all(arm.accuracy <= guess for arm in arms)
    if not any(_beats(arm, guess) for arm in arms) and (is_below or difference.status == "not shown"):
        return "not learned"
    if all(arm.accuracy == 1 for arm in arms):
        return "all right"
    return difference.status


def _beats(arm: Arm, guess: float) -> bool:
    """Whether an arm is shown to be better than guessing; free texts are not guessed."""
    return arm.measure is not ACCURACY or arm.interval[0] > guess


def _described(guess: Guess) -> str:
    return f"{guess.label} ({100 * guess.accuracy:.1f} %)" if guess.accuracy else guess.label


def _not_compared(arm: Arm, baselines: Sequence[Arm], caveats: list[str]) -> Verdict:
    differing = {id(other): _differing(arm, other) for other in baselines}
    rivals = [other for other in baselines if "task" not in differing[id(other)]]
    command = f"{TO_RUN}{baseline_command(arm.runs)}"
    if not rivals:
        lead = f"{arm.label}: no baseline was run, so the report cannot say whether distillation helped."
        return Verdict(arm, "no baseline", lead, (*caveats, command))
    rival = min(rivals, key=lambda other: len(differing[id(other)]))
    terms = [f"{key} {arm.settings[key][:16]} versus {rival.settings[key][:16]}" for key in differing[id(rival)]]
    lead = f"{arm.label}: not compared with {arm.baseline}, because the budgets differ ({', '.join(terms)})."
    return Verdict(arm, "not compared", lead, (*caveats, command))


def _sentence(difference: Difference, status: Status, guess: Guess) -> str:
    arm, rival, points = difference.arm, difference.rival, difference.points
    measure = difference.measure
    column = MAIN_COLUMNS[measure.key]
    figures = f"{cell(arm, column)} versus {cell(rival, column)}"
    if status == "not learned":
        return (
            f"{arm.label}: neither this student nor {rival.name} learned the task: neither is shown to be better than "
            f"{_described(guess)} ({figures})."
        )
    if status == "all right":
        return f"{arm.label}: this student and {rival.name} answer every test example right, so the test is too easy."
    side = "above" if points > 0 else "below"
    claim = f"{measure.size(points)} {side} {rival.name} at equal budget ({figures})"
    is_shown = difference.status != "not shown"
    lead = f"{arm.label} {measure.verb} {difference.wording}: {claim}" if is_shown else f"{arm.label}: {claim}"
    doubt = "" if is_shown else NOT_SHOWN if difference.is_ahead else " The student is not better."
    basis = _pairing(difference) if difference.interval else _unpaired(difference)
    return f"{lead}{basis}{doubt}{_power(difference)}{_share(difference)}{_wording(difference)}"


def _wording(difference: Difference) -> str:
    """State the differences of how free texts are worded; higher is better."""
    parts = [f"{name} {i.estimate:+.1f} [{i.low:+.1f}, {i.high:+.1f}]" for name, i in difference.overlaps.items()]
    return f" Difference in wording to the {difference.measure.texts}: {', '.join(parts)}." if parts else ""


def _over_hard_labels(difference: Difference) -> str:
    measure = difference.measure
    ends = f" [{measure.ends(difference.ends)}]" if difference.ends else ""
    return f" Against the teacher's answers alone: {measure.difference(difference.points)}{ends}, {difference.wording}."


def _unpaired(difference: Difference) -> str:
    if difference.status != "not shown":
        return f". The {percent(difference.level)} intervals do not overlap."
    is_missing = math.isnan(difference.arm.interval[0] + difference.rival.interval[0])
    return f", but {'an interval is missing' if is_missing else f'the {percent(difference.level)} intervals overlap'}."


def _pairing(difference: Difference) -> str:
    """State the interval, its level and the pairing."""
    assert difference.interval is not None
    assert difference.ends is not None
    measure, seeds = difference.measure, difference.interval.num_seeds
    by = f"{seeds} seeds and " if seeds > 1 else ""
    by += f"{difference.interval.num_examples} test examples"
    level, number = percent(difference.level), difference.num_comparisons
    joint = percent(1 - number * (1 - difference.level))
    family = f"; {level} for each of the {number} comparisons, so {joint} for all together" if number > 1 else ""
    includes = ", which includes 0" if difference.status == "not shown" else ""
    ends = f"{measure.ends(difference.ends, ' to ')} {measure.unit_of_differences}"
    lead = f". The {level} interval of the difference is {ends}{includes}"
    return f"{lead} (paired by {by}{family})."


def _power(difference: Difference) -> str:
    if difference.status != "not shown" or not difference.detectable:
        return ""
    size = f"a true difference of {difference.measure.size(difference.detectable)}"
    if difference.has_one_seed:
        return f" This data would show {size} four times out of five."
    # The spread of a few seeds is itself uncertain, and with it the power.
    return f" With so few seeds, even {size} would often be missed."


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
