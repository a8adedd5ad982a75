"""Helpers shared by the tests of tasks."""

from __future__ import annotations

from typing import Any

from distill.tasks.answers import AnswerFormat


def answer_format(kind: Any = None, pattern: str | None = None, choices: list[Any] | None = None) -> AnswerFormat:
    return AnswerFormat(kind=kind, pattern=pattern, choices=choices or [])
