"""Verdicts at the ends: nothing learned, everything right, one seed, worse than the teacher's answers alone."""

from __future__ import annotations

import re
from typing import Any

import pytest

from distill.reports.classes import best_guess
from distill.reports.conclusion import best_verdict, conclude
from distill.reports.page import to_html
from distill.reports.statistics import family_level
from distill.reports.tables import difference_row, tables
from distill.reports.text import to_markdown, to_text
from distill.reports.verdicts import Summary
from tests.reports.conftest import Make, answers, prediction, summary_of, two_classes

FREE_TEXT = [prediction(k, False, False) | {"gold": f"answer {k}", "student_answer": "?"} for k in range(150)]
NONE_RIGHT: dict[str, Any] = {"predictions": FREE_TEXT, "student": {"num_examples": 150}}


def words(text: str) -> str:
    return " ".join(text.split())


def test_two_arms_without_a_right_answer_have_not_learned_the_task(make_run: Make) -> None:
    summary = summary_of(make_run(("answer",), 0.0, **NONE_RIGHT), make_run(accuracy=0.0, **NONE_RIGHT))
    (verdict,) = summary.verdicts
    assert verdict.status == verdict.wording == "not learned"
    assert "neither this student nor labels alone learned the task" in verdict.sentence
    assert conclude(summary).headline == "No arm learned the task."
    assert verdict.difference is not None
    assert verdict.difference.ends == pytest.approx((-2.5, 2.5), abs=0.01)
    for text in (to_text(summary), to_markdown(summary), to_html(summary)):
        assert "recovers" not in text
        assert "No arm learned the task." in text


@pytest.mark.parametrize(("share", "expected"), [(0.52, "not learned"), (0.60, "not shown")])
def test_arms_that_are_not_shown_to_beat_the_most_frequent_answer_have_not_learned(
    make_run: Make, share: float, expected: str
) -> None:
    folders = [
        make_run(losses, share, predictions=two_classes(answers(losses, share, 0))) for losses in (("answer",), ("kl",))
    ]
    summary = summary_of(*folders)
    guess = best_guess(summary.trained)
    assert guess is not None
    assert guess.accuracy == 0.5
    (verdict,) = summary.verdicts
    assert verdict.status == expected
    assert ("always answering" in verdict.sentence) == (expected == "not learned")


def test_an_arm_that_beats_labels_alone_but_not_guessing_is_better_with_a_caveat(make_run: Make) -> None:
    sides = ((("answer",), 0.35), (("kl",), 0.53))
    folders = [make_run(losses, p, predictions=two_classes(answers(losses, p, 0))) for losses, p in sides]
    (verdict,) = summary_of(*folders).verdicts
    assert verdict.status == "better"
    assert any("not shown to be better than always answering" in caveat for caveat in verdict.caveats)


def test_a_difference_between_arms_below_guessing_is_no_success(make_run: Make) -> None:
    sides = ((("answer",), 0.2), (("kl",), 0.4))
    folders = [make_run(losses, p, predictions=two_classes(answers(losses, p, 0))) for losses, p in sides]
    assert [verdict.status for verdict in summary_of(*folders).verdicts] == ["not learned"]


def test_arms_that_answer_everything_right_are_not_told_apart(make_run: Make) -> None:
    few = {"student": {"num_examples": 20}}
    folders = [make_run(losses, 1.0, seed, **few) for losses in (("answer",), ("kl",)) for seed in (0, 1)]
    summary = summary_of(*folders)
    (verdict,) = summary.verdicts
    assert verdict.status == "all right"
    assert verdict.difference is not None
    assert verdict.difference.ends == pytest.approx((-16.1, 16.1), abs=0.1)
    assert "too easy" in conclude(summary).headline
    almost = [make_run(losses, p, 0, **few) for losses, p in ((("answer",), 0.95), (("kl",), 1.0))]
    assert summary_of(*almost).verdicts[0].status == "not shown"


@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_no_share_of_the_teachers_advantage_is_said_where_nothing_was_compared(make_run: Make, accuracy: float) -> None:
    more: dict[str, Any] = NONE_RIGHT if accuracy == 0 else {"student": {"num_examples": 20}}
    (verdict,) = summary_of(make_run(("answer",), accuracy, **more), make_run(("kl",), accuracy, **more)).verdicts
    assert difference_row(verdict)[3] == "-"


def test_the_plain_table_names_both_sides_of_a_difference(make_run: Make) -> None:
    (row,) = tables(summary_of(make_run(("answer",), 0.6), make_run(("kl",), 0.8)))["differences"]
    assert (row["arm"], row["against"]) == ("kl", "student on labels alone")


def test_an_advantage_in_one_seed_is_never_green(make_run: Make) -> None:
    def shown(seeds: range) -> Summary:
        sides = ((("answer",), 0.6), (("kl",), 0.8))
        return summary_of(*(make_run(losses, p, seed) for losses, p in sides for seed in seeds))

    one, several = shown(range(1)), shown(range(3))
    assert [verdict.wording for verdict in one.verdicts] == ["better in one seed"]
    assert conclude(one).tone == "preliminary"
    assert "only one seed" in conclude(one).headline
    assert 'class="verdict better"' not in to_html(one)
    assert 'class="verdict lead better"' not in to_html(one)
    for text in (to_text(one), to_markdown(one)):
        assert "better in one seed" in words(text)
    assert [verdict.wording for verdict in several.verdicts] == ["better"]
    assert conclude(several)[:2] == ("better", "Distillation helped.")
    assert 'class="verdict better"' in to_html(several)
    assert 'class="verdict lead better"' in to_html(several)


def test_an_unpaired_advantage_in_one_seed_is_preliminary_too(make_run: Make) -> None:
    folders = [make_run(("answer",), 0.6, seed) for seed in (0, 1)]
    (verdict,) = summary_of(*folders, make_run(accuracy=0.9, without=("predictions.jsonl",))).verdicts
    assert (verdict.status, verdict.wording) == ("better", "better in one seed")


def test_an_arm_that_is_worse_than_the_teachers_answers_alone_is_worse(make_run: Make) -> None:
    arms = ((("answer",), 0.60), (("answer", "teacher_answer"), 0.75), (("answer", "kl"), 0.61))
    summary = summary_of(*(make_run(losses, p, seed) for losses, p in arms for seed in (0, 1, 2)))
    soft = next(verdict for verdict in summary.verdicts if "kl" in verdict.arm.losses)
    assert soft.difference is not None
    assert soft.difference.status == "not shown"
    assert soft.status == "worse"
    assert soft.wording == "worse than the teacher's answers alone"
    assert soft.deciding is soft.over_hard_labels
    assert re.search(r"Against the teacher's answers alone: -14.0 points \[-\d+.\d, -\d+.\d\], worse", soft.sentence)
    assert conclude(summary).headline == "Distillation helped."  # by the teacher's answers as labels
    assert "1 worse than the teacher's answers alone" in " ".join(conclude(summary).sentences)


@pytest.mark.parametrize(("validation", "expected"), [((0.9, 0.8), "kl"), ((None, 0.8), "rationale")])
def test_the_arm_to_prefer_is_chosen_on_validation_if_all_arms_have_it(
    make_run: Make, validation: tuple[float | None, float], expected: str
) -> None:
    sides = zip(("kl", "rationale"), (0.80, 0.82), validation, strict=True)
    folders = [make_run((loss,), p, student={"validation_accuracy": value}) for loss, p, value in sides]
    best = best_verdict(summary_of(make_run(("answer",), 0.6), *folders).verdicts)
    assert best is not None
    assert best.arm.name == expected


def test_comparisons_with_labels_and_with_hard_labels_are_one_family(make_run: Make) -> None:
    arms = (("answer",), ("answer", "teacher_answer"), ("answer", "kl"), ("answer", "rationale"))
    summary = summary_of(*(make_run(losses, 0.7) for losses in arms))
    levels = [
        difference.level
        for verdict in summary.verdicts
        for difference in (verdict.difference, verdict.over_hard_labels)
        if difference
    ]
    assert levels == pytest.approx([family_level(0.95, 5)] * 5)  # three arms, two of them also with hard labels


def test_unpaired_arms_are_compared_at_the_level_of_the_family(make_run: Make) -> None:
    arms = [make_run((name,), 0.745, without=("predictions.jsonl",)) for name in "abcdefgh"]
    (alone,) = summary_of(make_run(("answer",), 0.66), arms[0]).verdicts
    assert alone.status == "better"  # [70.7, 78.3] over [61.8, 70.2]
    together = summary_of(make_run(("answer",), 0.66), *arms).verdicts
    assert {verdict.status for verdict in together} == {"not shown"}
    assert "99.4 %" in together[0].sentence
