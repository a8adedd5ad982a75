"""Every figure of a row of results, counted by hand on predictions that differ in each of them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from distill.app.config import build
from distill.evaluation.answers import _comparison, as_prediction
from distill.evaluation.likelihoods import closeness_of
from distill.evaluation.metrics import Prediction, score
from distill.records import Annotation, Example, SoftTargets, Target
from distill.reports.proportions import wilson_interval
from tests.conftest import compose

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
    replace(ONE, confidence=0.9, kl=0.5, acceptance=(0.5, 0.75), agrees=True),
    replace(
        ONE,
        confidence=0.7,
        kl=0.25,
        acceptance=(0.75, 0.75),
        agrees=True,
        is_written_correct=False,
        written_answer=None,
    ),
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


@pytest.mark.parametrize(
    ("answer", "teacher", "agrees", "is_teacher_right"),
    [("7", "7", True, False), ("8", "7", False, False), ("7", "8", False, True), (None, "8", False, True)],
)
def test_agreement_is_with_the_teacher_whether_it_is_right_or_not(
    answer: str | None, teacher: str, agrees: bool, is_teacher_right: bool
) -> None:
    task = build(compose("task=arithmetic").task.examples)
    compared = _comparison(task, Example("How many?", "8"), answer, Annotation("", {}, teacher))
    assert (compared["agrees"], compared["is_teacher_correct"]) == (agrees, is_teacher_right)


def test_a_written_answer_is_judged_beside_the_chosen_one() -> None:
    task = build(compose("task=arithmetic").task.examples)
    prediction = as_prediction(task, Example("How many?", "8"), "8", "7")
    assert (prediction.is_correct, prediction.is_written_correct) == (True, False)
    prediction = as_prediction(task, Example("How many?", "8"), "7", "8")
    assert (prediction.is_correct, prediction.is_written_correct) == (False, True)


def test_the_divergence_from_the_teacher_is_a_mean_over_positions() -> None:
    """The teacher says (0.5, 0.25, rest 0.25) at both positions, the student (0.25, 0.5, rest 0.25)."""
    kept = np.log(np.array([0.5, 0.25] * 2, np.float32))
    ids, tail, numbers = np.array([0, 1] * 2), np.array([0.25] * 2, np.float32), np.array([2, 2])
    target = Target((5, 6), SoftTargets(ids, kept, tail, numbers))
    logprobs_NV = torch.tensor([[0.25, 0.5, 0.125, 0.125]] * 2).log()
    closeness = closeness_of(logprobs_NV, target)
    assert closeness is not None
    assert closeness.kl == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2), abs=1e-6)


def test_every_figure_of_a_row_is_the_one_that_is_counted() -> None:
    row = score(FIVE)
    assert row["accuracy"] == 3 / 5
    assert row["interval"] == list(wilson_interval(3, 5))
    assert row["num_examples"] == 5
    assert row["generated_accuracy"] == 1 / 4
    assert row["num_unreadable"] == 2
    assert row["agreement"] == pytest.approx(2 / 3)
    assert row["kl"] == pytest.approx(0.75 / 2)
    assert (row["acceptance_low"], row["acceptance_high"]) == (0.625, 0.75)
    # Bins of one prediction each: (|1 - 0.9| + |1 - 0.7| + |0 - 0.6|) / 3
    assert row["ece"] == pytest.approx((0.1 + 0.3 + 0.6) / 3)


def test_the_reliability_has_a_point_for_each_bin_with_its_number() -> None:
    points = score([FIVE[0], FIVE[0], FIVE[2]])["reliability"]
    assert [(p["num"], p["accuracy"], pytest.approx(p["confidence"])) for p in points] == [
        (1, 0.0, 0.6),
        (2, 1.0, 0.9),
    ]


@pytest.mark.parametrize("key", ["generated_accuracy", "agreement", "kl", "acceptance_low", "acceptance_high", "ece"])
def test_a_figure_without_a_prediction_is_none_and_not_zero(key: str) -> None:
    bare = replace(ONE, is_written_correct=None)
    assert score([bare, bare])[key] is None


def test_calibration_and_accuracy_count_the_same_answers_as_right() -> None:
    accepted = replace(FIVE[0], gold="no", accepted=("yes",), right_values=("no", "yes"))
    row = score([accepted])
    assert (row["accuracy"], row["ece"]) == (1.0, pytest.approx(0.1))
    assert row["reliability"] == [{"confidence": 0.9, "accuracy": 1.0, "num": 1}]
