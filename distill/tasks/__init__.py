"""Tasks: where examples come from, and how answers are read and compared.

A new task is a file in this package and one in conf/task/. Nothing here depends on tokens or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from distill.errors import AnswerError
from distill.records import Example, Splits


@runtime_checkable
class Task(Protocol):
    """Interface of a task. Change `version` whenever its examples or its rules for reading answers change."""

    version: str
    choices: Sequence[str]

    def splits(self) -> Splits:
        """Train (labelled examples first), validation and test, disjoint by content."""
        ...

    def shots(self) -> Sequence[Example]:
        """Demonstrations for few-shot prompts, with rationale and answer; none is in the splits."""
        ...

    def read_answer(self, text: str) -> str:
        """Read the canonical answer from a generated text; AnswerError if it has none."""
        ...

    def value(self, answer: str) -> str:
        """Value of a canonical answer; answers with equal values count as the same."""
        ...


def is_right(task: Task, answer: str | None, example: Example) -> bool:
    """Whether an answer has the value of one of the example's right answers."""
    return answer is not None and task.value(answer) in map(task.value, example.right_answers)


def readable_answer(task: Task, text: str) -> str | None:
    """Read the canonical answer from a text; None if it has no readable answer."""
    try:
        return task.read_answer(text)
    except AnswerError:
        return None
