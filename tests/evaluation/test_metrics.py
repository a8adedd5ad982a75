"""Metrics of predictions: intervals and calibration."""

from __future__ import annotations

import math

import pytest

from distill.evaluation.metrics import Prediction, score, wilson_interval


@pytest.mark.parametrize(("right", "number"), [(0, 7), (1, 1), (17, 200), (24_000, 25_000)])
def test_the_score_test_is_just_passed_at_the_ends_of_the_wilson_interval(right: int, number: int) -> None:
    low, high = wilson_interval(right, number)
    assert 0 <= low < high <= 1
    for end, is_at_bound in ((low, right == 0), (high, right == number)):
        score = abs(right / number - end) / math.sqrt(end * (1 - end) / number) if 0 < end < 1 else None
        assert score is None if is_at_bound else score == pytest.approx(1.959964, abs=1e-6)


def prediction(gold: str, answer: str, confidence: float | None, *accepted: str) -> Prediction:
    return Prediction(
        example_id="",
        question="",
        gold=gold,
        accepted=accepted,
        right_values=(gold, *accepted),
        answer=answer,
        written_answer=None,
        is_correct=answer in (gold, *accepted),
        is_written_correct=None,
        confidence=confidence,
        kl=None,
    )


def test_calibration_is_the_gap_between_confidence_and_accuracy_in_each_bin() -> None:
    predictions = [
        prediction("no", "no", 0.75),
        prediction("yes", "no", 0.71),  # same bin as the first: accuracy 1/2, confidence 0.73
        prediction("yes", "yes", 0.8),  # on an edge: upper bin
        prediction("yes", "yes", 1.0),
        prediction("no", "yes", 0.95),  # same bin as certainty: accuracy 1/2, confidence 0.975
        prediction("maybe", "no", 0.55),  # gold is not a choice: any confidence is too much
        prediction("yes", "no", 0.62, "no"),  # not the gold answer, but accepted
        prediction("yes", "yes", None),
    ]
    row = score(predictions)
    assert row["ece"] == pytest.approx((2 * 0.23 + 0.2 + 2 * 0.475 + 0.55 + 0.38) / 7)
    assert [(part["confidence"], part["accuracy"], part["num"]) for part in row["reliability"]] == [
        pytest.approx(values) for values in ((0.55, 0, 1), (0.62, 1, 1), (0.73, 0.5, 2), (0.8, 1, 1), (0.975, 0.5, 2))
    ]


def test_answers_without_probabilities_have_no_calibration() -> None:
    row = score([prediction("yes", "yes", None)])
    assert (row["ece"], row["reliability"]) == (None, [])
