"""What a model's answers are judged by: accuracy, or the cross-entropy of held-out free texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measure:
    """A figure of results.json and how it is shown.

    `key` is its name there. `sign` is 1 if higher is better, -1 if lower is. Figures and differences are shown times
    `factor`, with `digits` and their units.
    """

    key: str
    name: str
    sign: int
    factor: float
    digits: int
    unit: str
    unit_of_differences: str

    def text(self, value: float) -> str:
        """Format a figure with its unit."""
        return f"{self.factor * value:.{self.digits}f}{self.unit}"

    def score(self, row: Mapping[str, Any], prefix: str = "") -> float | None:
        """Return the figure of a row of results such that higher is better; None if it was not measured."""
        value = row.get(f"{prefix}{self.key}")
        return None if value is None else self.sign * float(value)


ACCURACY = Measure("accuracy", "accuracy", 1, 100.0, 1, " %", "points")
CROSS_ENTROPY = Measure("cross_entropy_per_byte", "cross-entropy", -1, 1.0, 4, " nats per byte", "nats per byte")


def measure_of(row: Mapping[str, Any]) -> Measure:
    """Return what decides about a row of results: free texts have no accuracy."""
    return CROSS_ENTROPY if CROSS_ENTROPY.key in row else ACCURACY
