"""The sentences on top of the report: which arm is preferred, and what is said about it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from distill.reports.conclusion import best_verdict, conclude
from tests.reports.conftest import Make, answers, prediction, summary_of, two_classes


def sentences(*folders: Any) -> str:
    return " ".join(conclude(summary_of(*folders)).sentences)


@pytest.mark.parametrize(("accuracy", "expected"), [(0.8, "20.0 points more than"), (0.4, "20.0 points less than")])
def test_the_conclusion_says_on_which_side_of_labels_alone_the_student_is(
    make_run: Make, accuracy: float, expected: str
) -> None:
    text = sentences(make_run(("answer",), 0.6), make_run(("kl",), accuracy))
    assert f"{expected} the same student trained on labels alone" in text


def test_the_conclusion_names_the_rival_that_decides(make_run: Make) -> None:
    arms = ((("answer",), 0.3), (("kl",), 0.5), (("teacher_answer",), 0.7))
    summary = summary_of(*(make_run(losses, p) for losses, p in arms))
    soft = next(verdict for verdict in summary.verdicts if verdict.arm.losses == ("kl",))
    text = " ".join(conclude(replace(summary, verdicts=(soft,))).sentences)
    assert "20.0 points less than the same student trained on the teacher's answers alone" in text


def test_of_better_arms_one_with_several_seeds_is_preferred_and_then_the_more_accurate(make_run: Make) -> None:
    baseline = [make_run(("answer",), 0.5, seed) for seed in (0, 1, 2)]
    several = [make_run((loss,), p, seed) for loss, p in (("kl", 0.7), ("rationale", 0.75)) for seed in (0, 1, 2)]
    best = best_verdict(summary_of(*baseline, *several, make_run(("reverse_kl",), 0.9)).verdicts)
    assert best is not None
    assert best.arm.losses == ("rationale",)


def test_the_teacher_is_as_many_times_larger_as_it_has_parameters(make_run: Make) -> None:
    text = sentences(make_run(("answer",)), make_run(("kl",), student={"parameters": 5_000_000}))
    assert "The teacher answers 82.0 % right, and has 10 times the parameters." in text


def lines(num_right: int) -> list[dict[str, Any]]:
    """300 questions of the class "positive", all right; and 100 of "negative", of which some are right."""
    of_positive = [prediction(k, True, True) for k in range(300)]
    of_negative = [prediction(300 + k, k < num_right, True) for k in range(100)]
    return of_positive + two_classes(of_negative, every=1)


@pytest.mark.parametrize(("num_right", "is_named"), [(40, True), (60, False)])
def test_a_class_is_named_if_it_is_answered_less_than_half_as_well_as_all(
    make_run: Make, num_right: int, is_named: bool
) -> None:
    accuracy = (300 + num_right) / 400
    folders = [
        make_run((loss,), accuracy, predictions=lines(num_right), student={"num_examples": 400})
        for loss in ("answer", "kl")
    ]
    assert (f"answer is “negative”, it answers only {num_right} % right" in sentences(*folders)) == is_named


def test_the_other_arms_are_counted_by_their_verdicts_without_the_preferred_one(make_run: Make) -> None:
    text = sentences(make_run(("answer",), 0.6), make_run(("kl",), 0.8), make_run(("rationale",), 0.4))
    assert "The other distilled arms: 1 worse." in text
    assert "other distilled arms" not in sentences(make_run(("answer",), 0.6), make_run(("kl",), 0.8))


def test_it_is_not_said_that_no_arm_learned_where_one_did(make_run: Make) -> None:
    def on(task: str, losses: tuple[str, ...], accuracy: float) -> Any:
        predicted = two_classes(answers((*losses, task), accuracy, 0))
        return make_run(losses, accuracy, task=task, predictions=predicted)

    unlearned = [on("a", ("answer",), 0.5), on("a", ("kl",), 0.5)]
    worse = [on("b", ("answer",), 0.9), on("b", ("kl",), 0.7)]
    assert conclude(summary_of(*unlearned)).headline == "No arm learned the task."
    assert conclude(summary_of(*unlearned, *worse)).headline == "It is not shown that distillation helped."
