"""Reasoning between marks, such as <think> and </think>, which some models write before an answer.

Their templates begin a turn of the assistant in which the model decides to reason, or begin the reasoning. A prompt
goes on where the template ends: for a rationale with the mark that opens the reasoning, for an answer alone with a
reasoning that is empty, after which the model answers at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distill.errors import ConfigError
from distill.records import Span

MARKS = ("<think>", "</think>")


@dataclass(frozen=True)
class Marks:
    """The texts before and after a model's reasoning."""

    open: str
    close: str

    @property
    def separator(self) -> str:
        """The text between a rationale and the answer after it."""
        return f"\n{self.close}\n\n"

    def is_closed(self, begun: str) -> bool:
        """Whether a turn begins after the reasoning, so that the model only answers."""
        return begun.rstrip().endswith(self.close)

    def openings(self, begun: str) -> Mapping[Span, str]:
        """What a prompt adds to a turn that a template has begun, by what is learned."""
        is_open = begun.rstrip().endswith(self.open)
        line = "" if is_open and begun.endswith("\n") else "\n"
        opened = line if is_open else f"{self.open}{line}"
        return {"rationale": opened, "answer": f"{opened}{self.separator}"}

    def removed(self, begun: str) -> str:
        """The beginning of a turn without a reasoning that is open or empty."""
        return re.sub(rf"{re.escape(self.open)}\s*(?:{re.escape(self.close)}\s*)?\Z", "", begun)


def marks_of(template: str, names: Sequence[str] | None) -> Marks | None:
    """The marks of these names, by default <think> and </think> if a template knows them; None without reasoning."""
    if names is None:
        return Marks(*MARKS) if MARKS[1] in template else None
    if names and (len(names) != 2 or not all(names)):
        raise ConfigError(
            f"prompt.layout.reasoning_marks={list(names)}: expected two texts, before and after the reasoning; [] for "
            "none, or null for those of the chat template"
        )
    return Marks(*names) if names else None
