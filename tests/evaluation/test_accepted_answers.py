"""Several right answers: the student's, the generated and the teacher's answer may each be any of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.evaluation.answers import as_prediction
from distill.records import Annotation, Example
from tests.conftest import arithmetic
from tests.tasks.conftest import answer_format
from tests.tasks.test_files import jsonl, task


@pytest.mark.parametrize(("answer", "is_right"), [("7", True), ("8", True), ("9", False), (None, False)])
def test_any_accepted_answer_is_right(answer: str | None, is_right: bool) -> None:
    example = Example("How many?", "7", accepted=("8",))
    prediction = as_prediction(arithmetic(), example, answer, answer, Annotation("key", {}, answer))
    assert prediction.gold == "7"
    judged = prediction.is_correct, prediction.is_written_correct, prediction.is_teacher_correct
    assert judged == (is_right, is_right, is_right)


def test_a_line_of_predictions_has_all_right_answers_and_their_values(tmp_path: Path) -> None:
    rows = [{"question": "Which sum?", "answer": ["3 + 5", "8", "2 * 5"]}]
    sums = task(jsonl(tmp_path, *rows), read=answer_format("expression"), num_test=0, num_validation=0)
    row = as_prediction(sums, sums.splits().train[0], "(1 + 9)", None).as_row()
    assert (row["gold"], row["accepted"], row["right_values"]) == ("3 + 5", ["8", "2 * 5"], ["8", "10"])
    assert row["is_correct"]


def test_an_unlabelled_example_has_no_right_answer() -> None:
    assert not as_prediction(arithmetic(), Example("How many?"), "7", "7").is_correct
