"""What needs no model and what hides behind an accuracy: guessing, and the answers to each class of questions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from distill.reports.arms import Arm
from distill.reports.measures import ACCURACY
from distill.reports.runs import mapping

MAX_CLASSES = 20
OTHER = "other or none"


class Guess(NamedTuple):
    """A way to answer without reading the question, and its expected accuracy on the test examples."""

    label: str
    accuracy: float


class ClassRow(NamedTuple):
    """Answers to the `num` questions of one class, over all seeds: per answer, and the shares that are right.

    `recall` is the share of the class that is answered right, `precision` the share of its answers that are right
    (None if the class is never answered).
    """

    name: str
    num: int
    answers: tuple[int, ...]
    recall: float
    precision: float | None


@dataclass(frozen=True)
class Confusion:
    """The answers of one arm by class; `answers` are the columns, with `OTHER` last if there are any."""

    arm: Arm
    answers: tuple[str, ...]
    rows: tuple[ClassRow, ...]


def gold_answers(arms: Sequence[Arm]) -> dict[str, str]:
    """Return the gold answers of the arms' test examples, by id."""
    lines = (line for arm in arms if arm.measure is ACCURACY for run in arm.runs for line in run.predictions)
    return {str(line.get("id")): str(line["gold"]) for line in lines if line.get("gold") not in (None, "")}


def _lists(arms: Sequence[Arm], key: str) -> dict[str, list[str]]:
    """Return the texts that the arms' test examples have in a list, by id, of those that have it."""
    lines = {str(line.get("id")): line.get(key) for arm in arms for run in arm.runs for line in run.predictions}
    return {id_: list(map(str, values)) for id_, values in lines.items() if isinstance(values, list)}


def _right_values(arms: Sequence[Arm]) -> dict[str, set[str]]:
    """Return the values of all right answers to each test example; earlier runs recorded the gold answer alone."""
    recorded = _lists(arms, "right_values")
    return {id_: set(recorded.get(id_) or [gold]) for id_, gold in gold_answers(arms).items()}


def classes(arms: Sequence[Arm]) -> tuple[str, ...]:
    """Return the classes of a task, the most frequent first; none if answers are free text or all are the same.

    Choices of a question's own are no classes: the letter A stands for another answer in every question.
    """
    if _lists(arms, "choices"):
        return ()
    counts = Counter(gold_answers(arms).values())
    is_classification = 1 < len(counts) <= min(MAX_CLASSES, counts.total() // 2)
    return tuple(sorted(counts, key=lambda name: (-counts[name], name))) if is_classification else ()


def guesses(arms: Sequence[Arm]) -> list[Guess]:
    """Return the answer that is most often right and, with classes, a random one; none if only one is ever right."""
    right = _right_values(arms)
    counts = Counter(value for values in right.values() for value in values)
    if len(counts) < 2:
        return []
    top = min(counts, key=lambda value: (-counts[value], value))
    majority = Guess(f"always answering “{top}”", counts[top] / len(right))
    own = _lists(arms, "choices")
    if chances := [_chance(values, own[id_]) for id_, values in right.items() if own.get(id_)]:
        return [majority, Guess("a random choice", sum(chances) / len(chances))]
    if not (names := classes(arms)):
        return [majority]
    answers = max([names, *map(_choices, arms)], key=len)
    chance = sum(_chance(values, answers) for values in right.values()) / len(right)
    return [majority, Guess(f"a random one of {len(answers)} answers", chance)]


def _chance(right: set[str], answers: Sequence[str]) -> float:
    """Return the share of the answers to a question that are right."""
    return max(1, len(right.intersection(answers))) / len(answers)


def best_guess(arms: Sequence[Arm]) -> Guess | None:
    """Return the way to guess with the highest accuracy."""
    return max(guesses(arms), key=lambda guess: guess.accuracy, default=None)


def _choices(arm: Arm) -> Sequence[str]:
    """The choices that the arm's configuration names, if any."""
    task = mapping(arm.runs[-1].config.get("task")) if arm.runs else {}
    named = mapping(task.get("examples")).get("choices") or task.get("choices")
    return named if isinstance(named, list) else []


def confusion(arm: Arm) -> Confusion | None:
    """Return the answers of a trained arm by class; None if the task has no classes."""
    names = classes([arm])
    counts = Counter(_answer(line, names) for run in arm.runs for line in run.predictions if line.get("gold") in names)
    if not counts:
        return None
    answered = {answer for _, answer in counts}
    columns = (*names, *([OTHER] if OTHER in answered else []))
    return Confusion(arm, columns, tuple(_class_row(name, columns, counts) for name in names))


def _answer(line: Mapping[str, object], names: Sequence[str]) -> tuple[str, str]:
    """Return the gold class and that of the answer; another text that is right counts as the gold one."""
    gold, answer = str(line["gold"]), str(line.get("student_answer"))
    return gold, gold if line.get("is_correct") is True else answer if answer in names and answer != gold else OTHER


def _class_row(name: str, columns: Sequence[str], counts: Mapping[tuple[str, str], int]) -> ClassRow:
    answers = tuple(counts.get((name, column), 0) for column in columns)
    right, num_answered = counts.get((name, name), 0), sum(counts.get((gold, name), 0) for gold in columns)
    return ClassRow(name, sum(answers), answers, right / sum(answers), right / num_answered if num_answered else None)
