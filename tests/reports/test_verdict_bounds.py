"""Where one verdict becomes another, what a verdict says, and which caveats it has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distill.reports.runs import read_run
from distill.reports.verdicts import Verdict, summarise
from tests.reports.conftest import Make, answers, summary_of, two_classes

BASELINE = ("answer",)


def verdict_of(*folders: Path) -> Verdict:
    (verdict,) = summary_of(*folders).verdicts
    return verdict


def by_losses(*folders: Path) -> dict[str, Verdict]:
    return {"+".join(verdict.arm.losses): verdict for verdict in summary_of(*folders).verdicts}


def with_row(folder: Path, name: str, **changes: Any) -> Path:
    """The run with other values in a row of its results."""
    path = folder / "results.json"
    results = json.loads(path.read_text())
    results["rows"][name] |= changes
    path.write_text(json.dumps(results))
    return folder


def test_only_the_students_own_start_counts_as_before_training(make_run: Make) -> None:
    other = with_row(make_run(("rationale",), 0.95, start="0badc0de"), "before", accuracy=0.9)
    verdict = by_losses(make_run(BASELINE, 0.8), make_run(("kl",), 0.74), other)["kl"]
    assert not [caveat for caveat in verdict.caveats if "before training" in caveat]


@pytest.mark.parametrize(("accuracy", "has_caveat"), [(0.519, True), (0.52, True), (0.521, False)])
def test_a_student_that_is_as_good_as_before_training_is_no_better(
    make_run: Make, accuracy: float, has_caveat: bool
) -> None:
    caveats = verdict_of(make_run(("kl",), accuracy)).caveats
    assert any("no better than before training (52.0 %)" in caveat for caveat in caveats) == has_caveat


def test_an_arm_that_is_worse_than_both_rivals_is_judged_by_labels_alone(make_run: Make) -> None:
    arms = ((BASELINE, 0.7), (("teacher_answer",), 0.75), (("kl",), 0.5))
    verdict = by_losses(*(make_run(losses, p) for losses, p in arms))["kl"]
    assert verdict.status == verdict.wording == "worse"
    assert not verdict.is_worse_than_hard_labels
    assert verdict.deciding is verdict.difference


def test_an_arm_that_is_better_than_the_teachers_answers_alone_is_judged_by_labels_alone(make_run: Make) -> None:
    arms = ((BASELINE, 0.7), (("teacher_answer",), 0.4), (("kl",), 0.5))
    verdict = by_losses(*(make_run(losses, p) for losses, p in arms))["kl"]
    assert verdict.over_hard_labels is not None
    assert (verdict.over_hard_labels.status, verdict.status) == ("better", "worse")
    assert not verdict.is_worse_than_hard_labels


@pytest.mark.parametrize(
    ("accuracies", "is_preliminary"), [((0.6, 0.8), True), ((0.8, 0.6), False), ((0.6, 0.6), False)]
)
def test_only_a_success_in_one_seed_is_preliminary(
    make_run: Make, accuracies: tuple[float, float], is_preliminary: bool
) -> None:
    labels, distilled = accuracies
    assert verdict_of(make_run(BASELINE, labels), make_run(("kl",), distilled)).is_preliminary == is_preliminary


def test_a_success_in_several_seeds_is_not_preliminary(make_run: Make) -> None:
    folders = [make_run(losses, p, seed) for losses, p in ((BASELINE, 0.5), (("kl",), 0.8)) for seed in range(3)]
    assert not verdict_of(*folders).is_preliminary


def test_the_nearest_budget_is_the_one_that_is_named(make_run: Make) -> None:
    far = make_run(BASELINE, 0.5, steps=7, batch_size=8, start="0badc0de")
    near, other_task = make_run(BASELINE, 0.5, steps=240), make_run(BASELINE, 0.5, task="arithmetic")
    verdict = verdict_of(far, near, other_task, make_run(("kl",), 0.9))
    assert verdict.status == "not compared"
    assert "because the budgets differ (steps 120 versus 240)." in verdict.sentence
    assert verdict.caveats[-1].startswith("To run the baseline: ")


def test_a_long_setting_is_named_by_its_first_16_characters(make_run: Make) -> None:
    verdict = verdict_of(make_run(BASELINE, 0.5, start="b" * 40), make_run(("kl",), 0.9, start="a" * 40))
    assert f"(start {'a' * 16} versus {'b' * 16})." in verdict.sentence


def test_an_arm_without_labels_alone_at_its_budget_does_not_widen_the_others(make_run: Make) -> None:
    alone = [make_run(losses, 0.7, steps=7) for losses in (("kl",), ("teacher_answer",))]
    verdicts = summary_of(make_run(BASELINE, 0.6), make_run(("kl",), 0.7), *alone).verdicts
    assert [verdict.difference.level for verdict in verdicts if verdict.difference] == [pytest.approx(0.95)]
    assert [verdict.status for verdict in verdicts].count("not compared") == 2


def test_the_level_of_a_summary_is_that_of_its_verdicts(make_run: Make) -> None:
    runs = [read_run(make_run(losses, 0.7)) for losses in (BASELINE, ("kl",))]
    for summary, level in ((summarise(runs), 0.95), (summarise(runs, 0.8), 0.8)):
        difference = summary.verdicts[0].difference
        assert difference is not None
        assert difference.level == pytest.approx(level)


def guessed(make_run: Make, losses: tuple[str, ...], accuracy: float, **student: Any) -> Path:
    """A run on two classes, of which each is right in half of the examples."""
    return make_run(losses, accuracy, predictions=two_classes(answers(losses, accuracy, 0)), student=student)


@pytest.mark.parametrize(("accuracy", "expected"), [(0.5, "not learned"), (0.502, "better")])
def test_an_arm_as_good_as_guessing_has_not_learned_though_it_is_better_than_labels_alone(
    make_run: Make, accuracy: float, expected: str
) -> None:
    verdict = verdict_of(guessed(make_run, BASELINE, 0.2), guessed(make_run, ("kl",), accuracy))
    assert verdict.difference is not None
    assert (verdict.difference.status, verdict.status) == ("better", expected)
    is_not_shown = "The student is not shown to be better than always answering “negative” (50.0 %)."
    assert (is_not_shown in verdict.caveats) == (expected == "better")
    assert ("than always answering “negative” (50.0 %) (" in verdict.sentence) == (expected == "not learned")


@pytest.mark.parametrize(("low", "expected"), [(0.5, "not learned"), (0.501, "not shown")])
def test_an_arm_beats_guessing_if_its_interval_lies_above(make_run: Make, low: float, expected: str) -> None:
    labels, distilled = ((BASELINE, 0.5), (("kl",), 0.53))
    folders = guessed(make_run, *labels, interval=[0.4, 0.6]), guessed(make_run, *distilled, interval=[low, 0.6])
    verdict = verdict_of(*folders)
    assert verdict.status == expected
    assert not [caveat for caveat in verdict.caveats if "not shown to be better than always" in caveat]


def test_one_arm_with_a_mistake_is_enough_to_tell_a_test_from_an_easy_one(make_run: Make) -> None:
    few = {"student": {"num_examples": 20}}
    folders = make_run(BASELINE, 1.0, **few), make_run(("kl",), 0.95, **few)
    assert verdict_of(*folders).status == "not shown"


def test_a_verdict_gives_both_accuracies(make_run: Make) -> None:
    sentence = verdict_of(make_run(BASELINE, 0.6), make_run(("kl",), 0.7)).sentence
    assert "at equal budget (70.0 % [" in sentence
    assert "] versus 60.0 % [" in sentence


def test_a_single_baseline_needs_no_choice_among_baselines(make_run: Make) -> None:
    verdict = verdict_of(make_run(BASELINE, 0.6), make_run(("kl",), 0.7))
    assert not [caveat for caveat in verdict.caveats if "baselines have this budget" in caveat]


def test_an_arm_with_the_same_answers_is_not_better(make_run: Make) -> None:
    lines = answers(BASELINE, 0.7, 0)
    verdict = verdict_of(*(make_run(losses, 0.7, predictions=lines) for losses in (BASELINE, ("kl",))))
    assert verdict.points == 0
    assert ": 0.0 points below labels alone" in verdict.sentence
    assert " The student is not better." in verdict.sentence


def test_arms_without_an_interval_are_not_said_to_overlap(make_run: Make) -> None:
    missing = with_row(
        make_run(("kl",), 0.9, without=("predictions.jsonl",)), "student", interval=None, num_examples=None
    )
    verdict = verdict_of(make_run(BASELINE, 0.6), missing)
    assert verdict.status == "not shown"
    assert ", but an interval is missing." in verdict.sentence
    near = verdict_of(make_run(BASELINE, 0.6, 1), make_run(("kl",), 0.61, 1, without=("predictions.jsonl",)))
    assert ", but the 95 % intervals overlap." in near.sentence


@pytest.mark.parametrize(
    ("num_seeds", "paired", "power"),
    [
        (1, "(paired by 500 test examples)", "This data would show a true difference of"),
        (2, "(paired by 2 seeds and 500 test examples)", "With so few seeds, even a true difference of"),
    ],
)
def test_a_verdict_says_what_is_paired_and_what_it_would_have_shown(
    make_run: Make, num_seeds: int, paired: str, power: str
) -> None:
    sides = ((BASELINE, 0.70), (("kl",), 0.71))
    verdict = verdict_of(*(make_run(losses, p, seed) for losses, p in sides for seed in range(num_seeds)))
    assert verdict.status == "not shown"
    assert paired in verdict.sentence
    assert power in verdict.sentence
    assert verdict.difference is not None
    assert f"a true difference of {verdict.difference.detectable:.1f} points" in verdict.sentence
