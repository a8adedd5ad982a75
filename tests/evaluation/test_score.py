"""Every figure of a row of results, counted by hand on predictions that differ in each of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from distill.evaluation.metrics import Prediction, score
from distill.reports.proportions import wilson_interval

ONE = Prediction(
    example_id="a",
    question="Is it?",
    gold="yes",
    accepted=(),
    right_values=("yes",),
    answer="yes",
    written_answer="yes",
    is_correct=True,
    is_written_correct=True,
    confidence=None,
    kl=None,
)
# Of five answers three are right; of four written ones one is, and two are unreadable; of three that the teacher
# answered two agree; two have a KL, three have probabilities.
FIVE = [
    replace(ONE, confidence=0.9, kl=0.5, agrees=True),
    replace(ONE, confidence=0.7, kl=0.25, agrees=True, is_written_correct=False, written_answer=None),
    replace(
        ONE,
        answer="no",
        is_correct=False,
        confidence=0.6,
        agrees=False,
        is_written_correct=False,
        written_answer=None,
    ),
    replace(ONE, is_written_correct=False, written_answer="no"),
    replace(ONE, is_correct=False, answer="no", is_written_correct=None, written_answer=None),
]


def test_every_figure_of_a_row_is_the_one_that_is_counted() -> None:
    row = score(FIVE)
    assert row["accuracy"] == 3 / 5
    assert row["interval"] == list(wilson_interval(3, 5))
    assert row["num_examples"] == 5
    assert row["generated_accuracy"] == 1 / 4
    assert row["num_unreadable"] == 2
    assert row["agreement"] == pytest.approx(2 / 3)
    assert row["kl"] == pytest.approx(0.75 / 2)
    # Bins of one prediction each: (|1 - 0.9| + |1 - 0.7| + |0 - 0.6|) / 3
    assert row["ece"] == pytest.approx((0.1 + 0.3 + 0.6) / 3)


def test_the_reliability_has_a_point_for_each_bin_with_its_number() -> None:
    points = score([FIVE[0], FIVE[0], FIVE[2]])["reliability"]
    assert [(p["num"], p["accuracy"], pytest.approx(p["confidence"])) for p in points] == [
        (1, 0.0, 0.6),
        (2, 1.0, 0.9),
    ]


@pytest.mark.parametrize("key", ["generated_accuracy", "agreement", "kl", "ece"])
def test_a_figure_without_a_prediction_is_none_and_not_zero(key: str) -> None:
    bare = replace(ONE, is_written_correct=None)
    assert score([bare, bare])[key] is None


def test_calibration_and_accuracy_count_the_same_answers_as_right() -> None:
    accepted = replace(FIVE[0], gold="no", accepted=("yes",), right_values=("no", "yes"))
    row = score([accepted])
    assert (row["accuracy"], row["ece"]) == (1.0, pytest.approx(0.1))
    assert row["reliability"] == [{"confidence": 0.9, "accuracy": 1.0, "num": 1}]
