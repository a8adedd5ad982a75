"""A verdict claims only what the interval of the paired difference shows."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from distill.reports.page import to_html
from distill.reports.statistics import detectable, family_level, paired_interval
from distill.reports.text import to_markdown, to_text
from tests.reports.conftest import Make, Page, answers, prediction, shuffled, summary_of


@pytest.mark.parametrize(
    ("accuracy", "status", "points", "phrase"),
    [
        (0.80, "better", 12.0, "12.0 points above labels alone at equal budget"),
        (0.70, "not shown", 2.0, "This does not show that the student is better."),
        (0.66, "not shown", -2.0, "The student is not better."),
        (0.55, "worse", -13.0, "13.0 points below labels alone at equal budget"),
    ],
)
def test_verdict_claims_only_what_the_interval_of_the_difference_shows(
    make_run: Make, accuracy: float, status: str, points: float, phrase: str
) -> None:
    (verdict,) = summary_of(make_run(("answer",), 0.68), make_run(accuracy=accuracy)).verdicts
    assert verdict.status == status
    assert verdict.points == pytest.approx(points)
    assert phrase in verdict.sentence
    assert ("which includes 0" in verdict.sentence) == (status == "not shown")
    assert ("would show a true difference of" in verdict.sentence) == (status == "not shown")
    assert any("one seed" in caveat for caveat in verdict.caveats)


def test_the_interval_is_paired_by_seed_and_example_id(make_run: Make) -> None:
    sides = [(("answer",), 0.68), (("answer", "kl"), 0.73)]
    folders = [
        make_run(losses, p, seed, predictions=answers(losses, p, seed)[:: -1 if "kl" in losses else 1])
        for losses, p in sides
        for seed in (2, 0, 1)
    ]
    (verdict,) = summary_of(*folders).verdicts
    right, left = (np.array([shuffled(p, 500, f"{losses}{k}") for k in range(3)], float) for losses, p in sides)
    expected = paired_interval(left, right)
    assert verdict.difference is not None
    assert verdict.difference.ends == pytest.approx((100 * expected.low, 100 * expected.high))
    assert verdict.difference.detectable == pytest.approx(100 * detectable(expected))
    assert "paired by 3 seeds and 500 test examples" in verdict.sentence


def test_examples_on_which_both_arms_agree_narrow_the_interval(make_run: Make) -> None:
    base = answers(("answer",), 0.68, 0)
    wrong = [k for k, line in enumerate(base) if not line["is_correct"]]
    more = [prediction(k, line["is_correct"] or k in wrong[:15], True) for k, line in enumerate(base)]
    folders = [make_run(("answer",), 0.68, predictions=base), make_run(accuracy=0.71, predictions=more)]
    (verdict,) = summary_of(*folders).verdicts
    assert verdict.status == "better"
    (unpaired,) = summary_of(make_run(("answer",), 0.68, seed=1), make_run(accuracy=0.71, seed=1)).verdicts
    assert unpaired.status == "not shown"


def test_only_shared_seeds_are_paired_with_a_caveat(make_run: Make) -> None:
    folders = [make_run(("answer",), 0.5, 0), make_run(("answer",), 0.9, 7), make_run(accuracy=0.7, seed=0)]
    (verdict,) = summary_of(*folders).verdicts
    assert verdict.points == pytest.approx(20)
    assert any("Paired on seed 0 only" in caveat for caveat in verdict.caveats)


def test_only_shared_examples_are_paired_with_a_caveat(make_run: Make) -> None:
    predictions = answers(("answer", "kl"), 0.8, 0)[:400]
    (verdict,) = summary_of(
        make_run(("answer",), 0.6), make_run(("answer", "kl"), 0.8, predictions=predictions)
    ).verdicts
    assert verdict.difference is not None
    assert verdict.difference.interval is not None
    assert verdict.difference.interval.num_examples == 400
    assert any("400 of 500 test examples" in caveat for caveat in verdict.caveats)


@pytest.mark.parametrize(("accuracy", "status"), [(0.80, "better"), (0.70, "not shown"), (0.55, "worse")])
def test_without_predictions_the_arms_own_intervals_are_compared_with_a_caveat(
    make_run: Make, accuracy: float, status: str
) -> None:
    folders = [make_run(("answer",), 0.68), make_run(accuracy=accuracy, without=("predictions.jsonl",))]
    (verdict,) = summary_of(*folders).verdicts
    assert verdict.status == status
    assert ("do not overlap" in verdict.sentence) == (status != "not shown")
    assert any("own 95 % intervals are compared" in caveat for caveat in verdict.caveats)


def test_several_arms_are_judged_at_a_joint_level(make_run: Make) -> None:
    arms = [("answer", "kl"), ("answer", "rationale"), ("answer", "kl", "rationale")]
    summary = summary_of(make_run(("answer",), 0.68), *(make_run(losses, 0.72) for losses in arms))
    for verdict in summary.verdicts:
        assert verdict.difference is not None
        assert verdict.difference.level == pytest.approx(family_level(0.95, 3)) == pytest.approx(1 - 0.05 / 3)
        assert "98.3 % for each of the 3 comparisons, so 95 % for all together" in verdict.sentence
    (alone,) = summary_of(make_run(("answer",), 0.68), make_run(arms[0], 0.72)).verdicts
    assert "The 95 % interval" in alone.sentence
    assert "together" not in alone.sentence


def test_soft_targets_are_also_compared_with_hard_labels_of_the_same_teacher(make_run: Make) -> None:
    hard = ("answer", "teacher_answer")
    folders = [make_run(("answer",), 0.6), make_run(hard, 0.7), make_run(("answer", "kl"), 0.75)]
    other, soft = sorted(summary_of(*folders).verdicts, key=lambda verdict: verdict.arm.has_hard_labels)[::-1]
    assert other.arm.losses == hard
    assert other.over_hard_labels is None
    assert other.points == pytest.approx(10)
    assert soft.points == pytest.approx(15)
    assert soft.over_hard_labels is not None
    assert soft.over_hard_labels.points == pytest.approx(5)
    assert "+5.0 [" in to_text(summary_of(*folders))
    assert "over hard labels" in Page(to_html(summary_of(*folders))).text


def test_hard_labels_with_another_budget_are_not_compared(make_run: Make) -> None:
    folders = [make_run(("answer",), 0.6), make_run(("answer", "teacher_answer"), 0.7, steps=7), make_run()]
    assert all(verdict.over_hard_labels is None for verdict in summary_of(*folders).verdicts)


def test_the_verdict_states_the_recovered_share_of_the_teachers_advantage(make_run: Make) -> None:
    (verdict,) = summary_of(make_run(("answer",), 0.62), make_run(accuracy=0.72)).verdicts
    assert verdict.difference is not None
    assert verdict.difference.share is not None
    assert verdict.difference.share.estimate == pytest.approx((0.72 - 0.62) / (0.82 - 0.62))
    assert re.search(r"It recovers 50 % \[\d+, \d+\] of the teacher's advantage", verdict.sentence)


def test_a_teacher_no_better_than_labels_alone_leaves_nothing_to_recover(make_run: Make) -> None:
    (verdict,) = summary_of(make_run(("answer",), 0.85), make_run(accuracy=0.9)).verdicts
    assert "The teacher is no better than labels alone." in verdict.sentence
    assert "recovers" not in verdict.sentence


def test_seeds_with_random_initial_weights_are_one_arm(make_run: Make) -> None:
    config = {"student": {"model": "m", "from_scratch": True}}
    folders = [
        make_run(losses, p, seed, config=config, start=f"start{seed}{losses}")
        for losses, p in ((("answer",), 0.6), (("kl",), 0.8))
        for seed in (0, 1)
    ]
    summary = summary_of(*folders)
    assert [len(arm.rows) for arm in summary.trained] == [2, 2]
    assert summary.verdicts[0].status == "better"


def test_a_verdict_without_a_baseline_names_the_command_for_it(make_run: Make) -> None:
    summary = summary_of(make_run())
    assert summary.verdicts[0].status == "no baseline"
    for text in (to_text(summary), Page(to_html(summary)).text):
        assert "not run" in text
        assert "python -m distill.train 'loss=[answer]'" in " ".join(text.split())
    assert "not run" in to_markdown(summary)


@pytest.mark.parametrize(
    "change",
    [{"steps": 240}, {"batch_size": 32}, {"start": "0badc0de"}, {"counts": {"labelled": 900, "test": 500}}],
)
def test_unequal_budgets_are_not_compared_and_are_named(make_run: Make, change: dict[str, Any]) -> None:
    (verdict,) = summary_of(make_run(("answer",), 0.5, **change), make_run(accuracy=0.9)).verdicts
    key = "labelled" if "counts" in change else next(iter(change))
    assert verdict.status == "not compared"
    assert verdict.points is None
    assert f"{key} " in verdict.sentence
    assert "budgets differ" in verdict.sentence


def test_the_best_baseline_with_the_same_budget_is_compared(make_run: Make) -> None:
    folders = [make_run(("answer",), p, config={"optim": {"lr": lr}}) for p, lr in ((0.60, 1e-4), (0.72, 1e-3))]
    folders.append(make_run(("answer",), 0.2, steps=7))
    (verdict,) = summary_of(*folders, make_run(accuracy=0.74)).verdicts
    assert verdict.points == pytest.approx(2.0)
    assert any("2 baselines" in caveat for caveat in verdict.caveats)


def test_a_baseline_of_another_task_does_not_count(make_run: Make) -> None:
    (verdict,) = summary_of(make_run(("answer",), task="arithmetic"), make_run()).verdicts
    assert verdict.status == "no baseline"


def test_a_student_no_better_than_before_training_has_a_caveat(make_run: Make) -> None:
    (verdict,) = summary_of(make_run(accuracy=0.50)).verdicts
    assert any("no better than before training (52.0 %)" in caveat for caveat in verdict.caveats)
