"""Accuracy if only the most confident answers are used."""

from __future__ import annotations

import itertools
import random
import statistics
from typing import Any

import pytest

from distill.reports.page import to_html
from distill.reports.selective import SHARES, selective, selective_accuracies
from distill.reports.tables import SELECTIVE_TITLES, selective_row, tables
from distill.reports.text import to_markdown, to_text
from tests.reports.conftest import Make, Page, prediction, summary_of

NUM = 8


def lines(right: str, confidences: list[float | None], **more: Any) -> list[dict[str, Any]]:
    """Predictions that are right where `right` has a 1."""
    return [
        prediction(index, mark == "1", True) | {"student_confidence": confidence} | more
        for index, (mark, confidence) in enumerate(zip(right, confidences, strict=True))
    ]


def plain(confidences: list[float | None], is_right: list[bool], share: int) -> float:
    """The mean over all orders of the questions of the accuracy of the first ones by confidence."""
    count, results = -(-share * len(is_right) // 100), []
    for order in itertools.permutations(range(len(is_right))):
        by_confidence = sorted(order, key=lambda k: -1.0 if (value := confidences[k]) is None else value, reverse=True)
        results.append(sum(is_right[k] for k in by_confidence[:count]) / count)
    return statistics.fmean(results)


@pytest.mark.parametrize("seed", range(4))
def test_the_accuracies_are_means_over_all_orders_of_questions(seed: int) -> None:
    drawn = random.Random(seed)
    confidences = [drawn.choice((None, 0.0, 0.5, 0.5, 0.9)) for _ in range(6)]
    is_right = [drawn.random() < 0.5 for _ in range(6)]
    expected = [plain(confidences, is_right, share) for share in SHARES]
    assert selective_accuracies(confidences, is_right) == pytest.approx(expected)


def test_the_order_of_lines_does_not_matter() -> None:
    drawn = random.Random(0)
    pairs = [(drawn.choice((0.5, 0.7, 1.0)), drawn.random() < 0.6) for _ in range(200)]
    expected = selective_accuracies(*map(list, zip(*sorted(pairs), strict=True)))
    for order in (sorted(pairs, reverse=True), drawn.sample(pairs, len(pairs))):
        assert selective_accuracies(*map(list, zip(*order, strict=True))) == pytest.approx(expected, abs=1e-12)


def test_an_arm_has_the_mean_over_its_seeds_and_all_questions_give_its_accuracy(make_run: Make) -> None:
    confidences = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, None]
    seeds = ("11101000", "11110000")
    student = {"num_examples": NUM}
    folders = [
        make_run(("kl",), 0.5, seed, student=student, predictions=lines(right, confidences))
        for seed, right in enumerate(seeds)
    ]
    summary = summary_of(*folders)
    (model,) = selective(summary.arms)
    assert model.arm is summary.trained[0]
    assert model.accuracies == (0.5, 0.5, 4 / 6, 0.875, 1.0)
    assert model.accuracies[0] == model.arm.accuracy
    assert selective_row(model)[-2:] == ["87.5 ± 17.7 %", "100.0 ± 0.0 %"]
    assert [row["accuracy"] for row in tables(summary)["selective"]] == list(model.accuracies)


def test_a_teacher_has_a_line_from_its_own_confidences(make_run: Make) -> None:
    teacher = [0.5, 0.6, 0.7, 0.8, 0.91, 0.92, 0.93, 0.94]
    predictions = lines("11110000", [0.9] * 4 + [0.1] * 4)
    for index, line in enumerate(predictions):
        line |= {"teacher_confidence": teacher[index], "is_teacher_correct": index in (5, 6, 7)}
    summary = summary_of(make_run(("kl",), 0.5, predictions=predictions, student={"num_examples": NUM}))
    rows = {model.arm.kind: model.accuracies for model in selective(summary.arms)}
    assert rows == {"teacher": (0.375, 0.375, 0.5, 0.75, 1.0), "distilled": (0.5, 0.5, 4 / 6, 1.0, 1.0)}
    for text in (to_text(summary), to_markdown(summary), Page(to_html(summary)).text):
        assert "75.0 %" in text
        assert "37.5 %" in text
        assert set(SELECTIVE_TITLES[0].split()) <= set(text.split())


def test_answers_without_confidences_have_no_such_table(make_run: Make) -> None:
    summary = summary_of(make_run(("kl",), 0.5, predictions=lines("1100", [None] * 4), student={"num_examples": 4}))
    assert not selective(summary.arms)
    assert "most confident" not in to_text(summary) + to_markdown(summary) + to_html(summary)


def test_free_texts_have_no_such_table(make_run: Make) -> None:
    folder = make_run(("kl",), 0.5, predictions=lines("1100", [0.5] * 4, is_correct=None), student={"num_examples": 4})
    assert not selective(summary_of(folder).arms)
