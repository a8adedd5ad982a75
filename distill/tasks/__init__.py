"""Tasks: where examples come from, and how answers are read and compared.

A new task is a file in this package and one in conf/task/. Nothing here depends on tokens or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

from distill.errors import AnswerError
from distill.records import Annotation, Example, Splits


@runtime_checkable
class Task(Protocol):
    """Interface of a task. Change `version` whenever its examples or its rules for reading answers change.

    `choices` are the possible answers to all questions; empty if answers are free text, or examples have choices of
    their own. `choices_of` gives those of an example. With `is_free_text`, answers are texts of which many are good;
    they are compared by their likelihood and their wording, and are neither right nor wrong.
    """

    version: str
    choices: Sequence[str]
    is_free_text: bool

    def splits(self) -> Splits:
        """Train (labelled examples first), validation and test, disjoint by content."""
        ...

    def shots(self) -> Sequence[Example]:
        """Demonstrations for few-shot prompts, with rationale and answer; none is in the splits."""
        ...

    def read_answer(self, text: str, example: Example) -> str:
        """Read the canonical answer from a text generated for an example; AnswerError if it has none."""
        ...

    def value(self, answer: str) -> str:
        """Value of a canonical answer; answers with equal values count as the same."""
        ...

    def is_same(self, answer: str, reference: str) -> bool:
        """Whether an answer counts as the same as a reference, by a rule that needs not be symmetrical."""
        ...


_CONTINUATIONS = ("555", " 555", "x", " x", "\n555")  # each changes what some kind of reader makes of a text


def choices_of(task: Task, example: Example) -> tuple[str, ...]:
    """All possible answers to an example: its own choices, else those of the task; empty for free text."""
    return example.choices or tuple(task.choices)


def is_right(task: Task, answer: str | None, example: Example) -> bool:
    """Whether an answer is the same as one of the example's right answers."""
    return answer is not None and any(task.is_same(answer, right) for right in example.right_answers)


def readable_answer(task: Task, text: str, example: Example) -> str | None:
    """Read the canonical answer from a text; None if it has no readable answer."""
    try:
        return task.read_answer(text, example)
    except AnswerError:
        return None


def with_reading(annotation: Annotation, task: Task, example: Example) -> Annotation:
    """Return the annotation of an example with its answer as the task reads it from the teacher's text.

    The text of a truncated annotation may hold a complete answer, one that is read the same however the text goes on;
    the result is then not truncated.
    """
    text = annotation.text
    if text is None:
        return annotation
    answer = readable_answer(task, text, example)
    is_cut = annotation.is_truncated and not _is_complete(task, text, answer, example)
    return replace(annotation, answer=answer, is_truncated=is_cut)


def _is_complete(task: Task, text: str, answer: str | None, example: Example) -> bool:
    return answer is not None and all(readable_answer(task, text + more, example) == answer for more in _CONTINUATIONS)
