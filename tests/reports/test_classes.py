"""Guessing, and the answers to each class of questions."""

from __future__ import annotations

from typing import Any

import pytest

from distill.reports.classes import OTHER, best_guess, classes, confusion, guesses
from distill.reports.conclusion import conclude
from distill.reports.page import to_html
from distill.reports.tables import class_rows, class_titles
from distill.reports.text import to_markdown, to_text
from tests.reports.conftest import Make, Page, prediction, summary_of


def line(index: int, gold: str, answer: str | None, is_correct: bool | None = None) -> dict[str, Any]:
    is_right = gold == answer if is_correct is None else is_correct
    return prediction(index, True, True) | {"gold": gold, "student_answer": answer, "is_correct": is_right}


# 60 "no", of which 57 right; 40 "yes", of which 2 right, one by another spelling, and one without an answer.
LINES = [
    *(line(k, "no", "no") for k in range(57)),
    *(line(57 + k, "no", "yes") for k in range(3)),
    *(line(60 + k, "yes", "no") for k in range(37)),
    *(line(97, "yes", "yes"), line(98, "yes", "Yes!", True), line(99, "yes", None))[:3],
]
FEW = {"num_examples": 100}


def test_a_confusion_table_counts_answers_by_class_over_all_seeds(make_run: Make) -> None:
    folders = [make_run(("kl",), 0.59, seed, predictions=LINES, student=FEW) for seed in (0, 1)]
    (arm,) = summary_of(*folders).trained
    table = confusion(arm)
    assert table is not None
    assert table.answers == ("no", "yes", OTHER)
    assert [row[:3] for row in table.rows] == [("no", 120, (114, 6, 0)), ("yes", 80, (74, 4, 2))]
    assert [row.recall for row in table.rows] == pytest.approx([0.95, 0.05])
    assert [row.precision for row in table.rows] == pytest.approx([114 / 188, 4 / 10])


def test_the_columns_of_a_class_say_what_they_hold(make_run: Make) -> None:
    (arm,) = summary_of(make_run(("kl",), 0.59, predictions=LINES, student=FEW)).trained
    table = confusion(arm)
    assert table is not None
    yes = dict(zip(class_titles(table), class_rows(table)[1], strict=True))
    assert yes == {
        "right answer": "yes",
        "answers": "40",
        "recall": "5.0 %",
        "precision": "40.0 %",
        "as “no”": "37",
        "as “yes”": "2",
        f"as “{OTHER}”": "1",
    }


def test_a_class_that_is_hardly_ever_answered_right_is_named_in_every_report(make_run: Make) -> None:
    summary = summary_of(make_run(("answer",), 0.59, predictions=LINES, student=FEW))
    summary_with_arm = summary_of(
        *(make_run((loss,), 0.59, predictions=LINES, student=FEW) for loss in ("answer", "kl"))
    )
    assert "“yes”, it answers only 5 % right" in " ".join(conclude(summary_with_arm).sentences)
    for text in (to_text(summary), to_markdown(summary), Page(to_html(summary)).text):
        assert "95.0 %" in text
        assert "5.0 %" in text
        assert "recall" in text


def test_guessing_is_the_most_frequent_answer_or_a_random_one(make_run: Make) -> None:
    summary = summary_of(make_run(("kl",), 0.59, predictions=LINES, student=FEW))
    assert [guess.label for guess in summary.guesses] == ["always answering “no”", "a random one of 2 answers"]
    assert [guess.accuracy for guess in summary.guesses] == [0.6, 0.5]
    assert best_guess(summary.trained) == summary.guesses[0]  # the one to beat
    for text in (to_text(summary), to_markdown(summary), Page(to_html(summary)).text):
        assert "always answering “no”" in text
        assert "60.0" in text


def test_guessing_is_right_where_an_accepted_answer_is(make_run: Make) -> None:
    lines = [row | {"right_values": ["no", "yes"] if k >= 80 else [row["gold"]]} for k, row in enumerate(LINES)]
    summary = summary_of(make_run(("kl",), 0.59, predictions=lines, student=FEW))
    assert [guess.label for guess in summary.guesses] == ["always answering “no”", "a random one of 2 answers"]
    assert [guess.accuracy for guess in summary.guesses] == [0.8, pytest.approx(0.6)]


def test_the_most_frequent_answer_is_found_by_value(make_run: Make) -> None:
    sums = [line(k, f"{k} - {k - 5}", "5", True) | {"right_values": ["5"]} for k in range(5, 35)]
    others = [line(k, "7", "5") | {"right_values": ["7"]} for k in range(35, 45)]
    (arm,) = summary_of(make_run(("kl",), 0.75, predictions=[*sums, *others])).trained
    assert guesses([arm]) == [("always answering “5”", 0.75)]


def test_choices_that_the_test_never_needs_count_for_the_random_answer(make_run: Make) -> None:
    config = {"task": {"examples": {"choices": ["no", "yes", "maybe", "never"]}}}
    summary = summary_of(make_run(("kl",), 0.59, predictions=LINES, student=FEW, config=config))
    assert summary.guesses[1] == ("a random one of 4 answers", 0.25)


def test_free_text_and_a_single_answer_have_no_classes(make_run: Make) -> None:
    free = [line(k, f"text {k}", "text 0") for k in range(40)]
    (arm,) = summary_of(make_run(("kl",), 0.025, predictions=free)).trained
    assert classes([arm]) == ()
    assert [guess.accuracy for guess in guesses([arm])] == [1 / 40]
    assert confusion(arm) is None
    (seeds,) = summary_of(*(make_run(("kl",), 0.1, seed, predictions=free[:12]) for seed in (0, 1, 2))).trained
    assert classes([seeds]) == ()  # an answer to the same question in three seeds is no class
    (same,) = summary_of(make_run(("kl",), predictions=[line(k, "yes", "yes") for k in range(40)])).trained
    assert guesses([same]) == []
    assert confusion(same) is None
    (unknown,) = summary_of(make_run(("kl",), without=("predictions.jsonl",))).trained
    assert guesses([unknown]) == []


def test_the_right_answers_are_those_of_all_seeds(make_run: Make) -> None:
    folders = [
        make_run(("kl",), 0.59, 0, without=("predictions.jsonl",)),
        make_run(("kl",), 0.59, 1, predictions=LINES),
    ]
    (arm,) = summary_of(*folders).trained
    assert classes([arm]) == ("no", "yes")


def test_guessing_is_named_by_task_where_there_are_several(make_run: Make) -> None:
    summary = summary_of(*(make_run(("kl",), 0.59, predictions=LINES, student=FEW, task=task) for task in ("a", "b")))
    assert [guess.label for guess in summary.guesses][::2] == ["a: always answering “no”", "b: always answering “no”"]


def test_guessing_among_a_questions_own_choices(make_run: Make) -> None:
    own = [["A", "B", "C", "D"][: 2 + k % 3] for k in range(60)]
    lines = [line(k, "AB"[k % 2], "A") | {"choices": own[k], "right_values": ["AB"[k % 2]]} for k in range(60)]
    (arm,) = summary_of(make_run(("answer",), 0.5, predictions=lines, student={"num_examples": 60})).trained
    majority, random = guesses([arm])
    assert majority == ("always answering “A”", 0.5)
    assert random.label == "a random choice"
    assert random.accuracy == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)
    assert classes([arm]) == ()  # A stands for another answer in every question
    assert confusion(arm) is None
    both = [one | {"right_values": ["A", "B"]} for one in lines]
    (arm,) = summary_of(make_run(("kl",), 0.5, predictions=both, student={"num_examples": 60})).trained
    assert guesses([arm])[1].accuracy == pytest.approx((2 / 2 + 2 / 3 + 2 / 4) / 3)
