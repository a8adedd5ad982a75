"""Metrics of predictions. Sums first, ratios last."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distill.reports.proportions import wilson_interval
from distill.reports.statistics import calibration_error, confidence_bins


@dataclass(frozen=True)
class Prediction:
    """A model's answer to one question.

    `answer` is judged: the most likely choice if the task has choices, else `written_answer`; None for a text
    without a readable answer. The task decides whether two answers are equal. `kl` is KL(teacher || model) in nats
    per answer token. Fields about the teacher are None if it did not annotate the question.
    """

    example_id: str
    question: str
    gold: str
    answer: str | None
    written_answer: str | None
    is_correct: bool
    is_written_correct: bool | None
    choice_probabilities: tuple[float, ...]
    kl: float | None
    teacher_answer: str | None = None
    teacher_confidence: float | None = None
    is_teacher_correct: bool | None = None
    agrees: bool | None = None
    rationale: str | None = None

    @property
    def confidence(self) -> float | None:
        """Probability of the answer among the choices; None without choices."""
        return max(self.choice_probabilities) if self.choice_probabilities else None

    def as_row(self) -> dict[str, Any]:
        """Return the prediction as a line of predictions.jsonl."""
        return {
            "id": self.example_id,
            "question": self.question,
            "gold": self.gold,
            "teacher_answer": self.teacher_answer,
            "teacher_confidence": self.teacher_confidence,
            "teacher_rationale": None,
            "student_answer": self.answer,
            "student_written_answer": self.written_answer,
            "student_confidence": self.confidence,
            "student_rationale": self.rationale,
            "is_correct": self.is_correct,
            "is_teacher_correct": self.is_teacher_correct,
            "agrees": self.agrees,
        }


def score(predictions: Sequence[Prediction], choices: Sequence[str]) -> dict[str, Any]:
    """Return accuracy with its interval, agreement, KL and calibration; None for what was not measured."""
    number = len(predictions)
    right = sum(p.is_correct for p in predictions)
    written = [p for p in predictions if p.is_written_correct is not None]
    agreements = [p.agrees for p in predictions if p.agrees is not None]
    kls = [p.kl for p in predictions if p.kl is not None]
    return {
        "accuracy": right / number,
        "interval": list(wilson_interval(right, number)),
        "num_examples": number,
        "generated_accuracy": _ratio(sum(bool(p.is_written_correct) for p in written), len(written)),
        "num_unreadable": sum(p.written_answer is None for p in written),
        "agreement": _ratio(sum(agreements), len(agreements)),
        "kl": _ratio(math.fsum(kls), len(kls)),
        "ece": _calibration_error(predictions, choices),
        "reliability": _reliability(predictions),
    }


def _ratio(total: int | float, number: int) -> float | None:
    return total / number if number else None


def _calibration_error(predictions: Sequence[Prediction], choices: Sequence[str]) -> float | None:
    """Return the error of the most likely choices, over predictions whose gold answer is a choice."""
    chosen = [p for p in predictions if p.choice_probabilities and p.gold in choices]
    if not chosen:
        return None
    confidence = [max(p.choice_probabilities) for p in chosen]
    best = [choices[p.choice_probabilities.index(top)] for p, top in zip(chosen, confidence, strict=True)]
    return calibration_error(confidence, [choice == p.gold for choice, p in zip(best, chosen, strict=True)])


def _reliability(predictions: Sequence[Prediction]) -> list[dict[str, float]]:
    known = [(p.confidence, p.is_correct) for p in predictions if p.confidence is not None]
    values = np.array(known, np.float64).reshape(-1, 2)
    return [
        {
            "confidence": float(values[places, 0].mean()),
            "accuracy": float(values[places, 1].mean()),
            "num": len(places),
        }
        for _, _, places in confidence_bins(values[:, 0])
    ]
