"""Tasks: where examples come from, how an answer is read out of text, how it is scored.

A new task is one file here and one in conf/task/. Nothing here knows of tokens or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from distill.errors import AnswerError
from distill.records import Example, Splits


@runtime_checkable
class Task(Protocol):
    """What the pipeline asks of a task. `version` changes whenever its examples or reading rules do."""

    version: str
    choices: Sequence[str]

    def splits(self) -> Splits:
        """Train (labelled first), validation and test examples, disjoint by content."""
        ...

    def shots(self) -> Sequence[Example]:
        """Demonstrations for few-shot prompts, with rationale and answer; never from the splits."""
        ...

    def read_answer(self, text: str) -> str:
        """Canonical answer in a generated text; raises AnswerError where there is none."""
        ...

    def value(self, answer: str) -> str:
        """What a canonical answer comes to: two answers with one value are the same answer in other words."""
        ...


def readable_answer(task: Task, text: str) -> str | None:
    """The canonical answer in a text; None where the task reads none."""
    try:
        return task.read_answer(text)
    except AnswerError:
        return None
