"""The report's first sentences: whether distillation helped, for a reader who reads nothing else."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from distill.reports.arms import Arm
from distill.reports.classes import confusion
from distill.reports.differences import percent
from distill.reports.measures import ACCURACY
from distill.reports.verdicts import Status, Summary, Verdict
from distill.reports.words import sentence

_NOTHING = "No distilled student was evaluated, so there is nothing to judge."
ONE_SEED = "Only one seed was trained, and another seed may turn the result round; train more (-m seed=0,1,2)."
# From the verdict that is preferred to the one that is not.
RANKS: tuple[Status, ...] = ("better", "all right", "not shown", "not learned", "not compared", "no baseline", "worse")
HEADLINES: dict[Status, str] = {
    "better": "Distillation helped.",
    "all right": "This test is too easy to show whether distillation helped.",
    "not shown": "It is not shown that distillation helped.",
    "not learned": "No arm learned the task.",
    "not compared": "It is not known whether distillation helped.",
    "no baseline": "It is not known whether distillation helped.",
    "worse": "Distillation did not help.",
}
LOW_RECALL = 0.5  # of the arm's accuracy: a class below is named


class Conclusion(NamedTuple):
    """A headline, sentences that support it, and the status that they rest on."""

    tone: str
    headline: str
    sentences: tuple[str, ...]


def conclude(summary: Summary) -> Conclusion:
    """Judge the report as a whole by its best distilled arm."""
    best = best_verdict(summary.verdicts)
    if best is None:
        return Conclusion("no baseline", _NOTHING, ())
    headline = HEADLINES[best.status]
    if best.is_preliminary:
        headline = "Distillation may have helped, but only one seed was trained."
    if best.status == "not learned" and any(_has_learned(verdict) for verdict in summary.verdicts):
        headline = HEADLINES["not shown"]
    words = sentence(best.over_words) if best.over_words else ""
    candidates = (_accuracy(best), _teacher(best.arm, summary), words, _guess(summary), _weak_class(best.arm))
    sentences = [*candidates, ONE_SEED if best.is_preliminary else "", _others(best, summary.verdicts)]
    return Conclusion(tone(best), headline, tuple(filter(None, sentences)))


def best_verdict(verdicts: Sequence[Verdict]) -> Verdict | None:
    """Return the verdict on the arm to prefer: by status, several seeds before one, then by its score.

    The score is that on validation if every arm has one, so that the choice does not flatter the figure on test.
    """
    validation = [verdict.arm.stat(f"validation_{verdict.arm.measure.key}").mean for verdict in verdicts]
    has_validation = not any(map(math.isnan, validation))
    prefix = "validation_" if has_validation else ""
    return min(
        verdicts,
        key=lambda verdict: (RANKS.index(verdict.status), verdict.is_preliminary, -_score(verdict.arm, prefix)),
        default=None,
    )


def _score(arm: Arm, prefix: str) -> float:
    return arm.measure.sign * arm.stat(f"{prefix}{arm.measure.key}").mean


def tone(verdict: Verdict) -> str:
    """Return the name of a verdict's colour: an advantage in one seed alone is not shown as success."""
    return "preliminary" if verdict.is_preliminary else verdict.status


def _has_learned(verdict: Verdict) -> bool:
    return verdict.status not in ("not learned", "no baseline", "not compared")


def _accuracy(verdict: Verdict) -> str:
    arm, deciding, measure = verdict.arm, verdict.deciding, verdict.arm.measure
    figure = measure.text(arm.stat(measure.key).mean)
    does = f"answers {figure} of the test right"
    if measure is not ACCURACY:
        does = f"has a {measure.name} of {figure} along the {measure.texts} of the test"
    answers = f"The best student (learned from: {arm.name}) {does}"
    if deciding is None:
        is_missing = verdict.status == "no baseline"
        reason = f"no student was trained on {arm.baseline}" if is_missing else "the budgets differ"
        return f"{answers}; {reason}, so there is nothing to compare it with."
    rival = "the teacher's answers alone" if verdict.is_worse_than_hard_labels else deciding.rival.name
    if verdict.status in ("not learned", "all right"):
        return f"{answers}, the same student trained on {rival} {100 * deciding.rival.accuracy:.1f} %."
    side = "more" if deciding.points > 0 else "less"
    size = measure.size(deciding.points)
    ends = ""
    if deciding.ends:
        ends = f" ({percent(deciding.level)} interval {measure.ends(deciding.ends, ' to ')})"
    return f"{answers}, {size} {side} than the same student trained on {rival}{ends}."


def _teacher(arm: Arm, summary: Summary) -> str:
    """Compare the arm with its teacher in accuracy and size."""
    teachers = [other for other in summary.arms if other.kind == "teacher"]
    teacher = next((other for other in teachers if other.settings.items() <= arm.settings.items()), None)
    if teacher is None:
        return ""
    factor = teacher.stat("parameters").mean / arm.stat("parameters").mean
    has = "and has" if teacher.measure is ACCURACY else "and the teacher has"
    size = f", {has} {factor:,.0f} times the parameters" if not math.isnan(factor) and factor >= 2 else ""
    if teacher.measure is ACCURACY:
        return f"The teacher answers {100 * teacher.accuracy:.1f} % right{size}."
    own, taught = (other.stat("chrf").mean for other in (teacher, arm))
    if math.isnan(own + taught):
        return f"The student's texts have a chrF of {arm.stat('teacher_chrf').mean:.1f} to the teacher's{size}."
    return f"Compared with the gold texts, the teacher's have a chrF of {own:.1f} and the student's {taught:.1f}{size}."


def _guess(summary: Summary) -> str:
    lines = ", ".join(f"{guess.label} {100 * guess.accuracy:.1f} %" for guess in summary.guesses)
    return f"Without reading the question: {lines}." if lines else ""


def _weak_class(arm: Arm) -> str:
    """Name the class that the arm answers worst, if it is far below its accuracy."""
    table = confusion(arm)
    worst = min(table.rows, key=lambda row: row.recall) if table else None
    if worst is None or worst.recall > LOW_RECALL * arm.accuracy:
        return ""
    return f"Of the questions whose answer is “{worst.name}”, it answers only {100 * worst.recall:.0f} % right."


def _others(best: Verdict, verdicts: Sequence[Verdict]) -> str:
    ranked = sorted(verdicts, key=lambda verdict: RANKS.index(verdict.status))
    counts = Counter(verdict.wording for verdict in ranked if verdict is not best)
    parts = ", ".join(f"{count} {wording}" for wording, count in counts.items())
    return f"The other distilled arms: {parts}." if parts else ""
