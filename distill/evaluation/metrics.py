"""Metrics of predictions. Sums first, ratios last."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from distill.evaluation.texts import TextMeasures, score_texts
from distill.records import Message
from distill.reports.proportions import wilson_interval
from distill.reports.statistics import calibration_error, confidence_bins


@dataclass(frozen=True)
class Prediction:
    """A model's answer to one question.

    `answer` is judged: the most likely choice if the question has choices, else `written_answer`; None for a text
    without a readable answer. `confidence` is its probability among the choices, None without choices. An answer is
    right if its value is one of `right_values`, those of `gold` and of all further `accepted` answers. `kl` is
    KL(teacher || model) in nats per answer token; `acceptance` has the bounds of the share of these tokens that the
    teacher accepts from the model in speculative decoding. `choices` are the question's own, not those of the task.
    Fields about the teacher are None if it did not annotate the question. Free texts are neither right nor wrong:
    `is_correct` is None, and `text` has what was measured instead.
    """

    example_id: str
    question: str
    gold: str
    accepted: tuple[str, ...]
    right_values: tuple[str, ...]
    answer: str | None
    written_answer: str | None
    is_correct: bool | None
    is_written_correct: bool | None
    confidence: float | None
    kl: float | None
    acceptance: tuple[float, float] | None = None
    teacher_answer: str | None = None
    teacher_confidence: float | None = None
    is_teacher_correct: bool | None = None
    agrees: bool | None = None
    choices: tuple[str, ...] = ()
    rationale: str | None = None
    text: TextMeasures | None = None
    history: tuple[Message, ...] = ()

    def as_row(self) -> dict[str, Any]:
        """Return the prediction as a line of predictions.jsonl."""
        return {
            "id": self.example_id,
            **({"history": [*map(asdict, self.history)]} if self.history else {}),
            "question": self.question,
            "gold": self.gold,
            "accepted": list(self.accepted),
            "right_values": list(self.right_values),
            **({"choices": list(self.choices)} if self.choices else {}),
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
            **(self.text.as_row() if self.text else {}),
        }


def score(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Return accuracy with its interval, agreement, KL and calibration; None for what was not measured.

    Of free texts it returns their own measures instead.
    """
    if texts := [p.text for p in predictions if p.text]:
        return score_texts(texts)
    number = len(predictions)
    right = sum(bool(p.is_correct) for p in predictions)
    written = [p for p in predictions if p.is_written_correct is not None]
    agreements = [p.agrees for p in predictions if p.agrees is not None]
    kls = [p.kl for p in predictions if p.kl is not None]
    bounds = [p.acceptance for p in predictions if p.acceptance is not None]
    confidence = [p.confidence for p in predictions if p.confidence is not None]
    is_correct = [bool(p.is_correct) for p in predictions if p.confidence is not None]
    return {
        "accuracy": right / number,
        "interval": list(wilson_interval(right, number)),
        "num_examples": number,
        "generated_accuracy": _ratio(sum(bool(p.is_written_correct) for p in written), len(written)),
        "num_unreadable": sum(p.written_answer is None for p in written),
        "agreement": _ratio(sum(agreements), len(agreements)),
        "kl": _ratio(math.fsum(kls), len(kls)),
        "acceptance_low": _ratio(math.fsum(low for low, _ in bounds), len(bounds)),
        "acceptance_high": _ratio(math.fsum(high for _, high in bounds), len(bounds)),
        "ece": calibration_error(confidence, is_correct) if confidence else None,
        "reliability": _reliability(confidence, is_correct),
    }


def _ratio(total: int | float, number: int) -> float | None:
    return total / number if number else None


def _reliability(confidence: Sequence[float], is_correct: Sequence[bool]) -> list[dict[str, float]]:
    values = np.array([confidence, is_correct], np.float64)
    return [
        {
            "confidence": float(values[0, places].mean()),
            "accuracy": float(values[1, places].mean()),
            "num": len(places),
        }
        for _, _, places in confidence_bins(confidence)
    ]
