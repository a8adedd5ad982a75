"""What a model's answers are judged by: accuracy, or the cross-entropy of held-out free texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Status = Literal["better", "not shown", "worse"]


@dataclass(frozen=True)
class Measure:
    """A figure of results.json, and how it and its differences are shown: times `factor`, with `digits` and a unit.

    `key` is its name there. `sign` is 1 if higher is better, -1 if lower is; a score is the figure times the sign.
    `verb` and `wordings` say that an arm is better or worse. Of free texts, it is along those of `texts`: the sum of
    `nats` over that of `num_bytes`, in the lines of predictions.jsonl. `overlaps` are keys of
    its scores of wording there, with their names.
    """

    key: str
    name: str
    sign: int
    factor: float
    digits: int
    unit: str
    unit_of_differences: str
    verb: str
    wordings: tuple[tuple[Status, str], ...]
    texts: Literal["gold texts", "teacher's texts"] | None = None
    nats: str = ""
    num_bytes: str = ""
    overlaps: tuple[tuple[str, str], ...] = ()

    def text(self, value: float) -> str:
        """Format a figure with its unit."""
        return f"{self.factor * value:.{self.digits}f}{self.unit}"

    def shown(self, score: float) -> float:
        """Return the figure, or difference of figures, as it is shown for a score or a difference of scores."""
        return self.factor * self.sign * score

    def difference(self, shown: float) -> str:
        """Format a difference as it is shown, with its sign and unit."""
        return f"{shown:+.{self.digits}f} {self.unit_of_differences}"

    def ends(self, shown: tuple[float, float], separator: str = ", ") -> str:
        """Format the ends of the interval of a difference."""
        return f"{shown[0]:+.{self.digits}f}{separator}{shown[1]:+.{self.digits}f}"

    def size(self, shown: float) -> str:
        """Format a difference without its sign."""
        return f"{abs(shown):.{self.digits}f} {self.unit_of_differences}"

    def score(self, row: Mapping[str, Any], prefix: str = "") -> float | None:
        """Return the score of a row of results; None if it was not measured."""
        value = row.get(f"{prefix}{self.key}")
        return None if value is None else self.sign * float(value)


ACCURACY = Measure(
    key="accuracy",
    name="accuracy",
    sign=1,
    factor=100.0,
    digits=1,
    unit=" %",
    unit_of_differences="points",
    verb="is",
    wordings=(("better", "better"), ("not shown", "not shown"), ("worse", "worse")),
)
CROSS_ENTROPY = Measure(
    key="cross_entropy_per_byte",
    name="cross-entropy",
    sign=-1,
    factor=1.0,
    digits=4,
    unit=" nats per byte",
    unit_of_differences="nats per byte",
    verb="has a",
    wordings=(("better", "lower cross-entropy"), ("not shown", "not shown"), ("worse", "higher cross-entropy")),
    texts="gold texts",
    nats="gold_nats",
    num_bytes="gold_bytes",
    overlaps=(("chrf", "chrF"), ("rouge_l", "ROUGE-L")),
)
TEACHER_CROSS_ENTROPY = replace(
    CROSS_ENTROPY,
    key="teacher_cross_entropy_per_byte",
    texts="teacher's texts",
    nats="teacher_nats",
    num_bytes="teacher_bytes",
    overlaps=(("teacher_chrf", "chrF"), ("teacher_rouge_l", "ROUGE-L")),
)


def measure_of(row: Mapping[str, Any]) -> Measure:
    """Return what decides about a row of results: free texts have no accuracy, and some have no gold texts."""
    if CROSS_ENTROPY.key not in row:
        return ACCURACY
    along_teacher = row.get(TEACHER_CROSS_ENTROPY.key) is not None
    return TEACHER_CROSS_ENTROPY if row[CROSS_ENTROPY.key] is None and along_teacher else CROSS_ENTROPY
