"""An exported student whose questions have choices of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from distill.exports.folder import export
from tests.exports.conftest import MakeRun
from tests.exports.test_example import example_of, lines


def rows(folder: Path) -> list[str]:
    """A file of questions with unlike numbers of choices, and the overrides of a task that reads it."""
    texts = ["a hat", "a shoe", "the rain", "a wet hat"]
    rows = [{"question": f"Thing {n}?", "choices": texts[: 2 + n % 3], "answer": n % (2 + n % 3)} for n in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "rows.jsonl"
    return ["task=jsonl", f"task.path={path}", "task.choices=choices", "prompt.num_shots=0", "teacher.calibrate=0"]


@pytest.mark.slow
@pytest.mark.parametrize("answer", [pytest.param("letter", marks=pytest.mark.slow), "text"])
def test_example_card_and_harness_have_each_questions_choices(answer: str, make_run: MakeRun, tmp_path: Path) -> None:
    run_dir = make_run(*rows(tmp_path), f"task.options.answer={answer}")
    message = export(run_dir, tmp_path / "out")
    predictions = lines(run_dir / "predictions.jsonl")
    example = example_of(tmp_path / "out")
    student = example.Student(tmp_path / "out")
    replies = [student.reply(row["question"], row["choices"]) for row in predictions]
    assert [reply["answer"] for reply in replies] == [row["student_answer"] for row in predictions]
    assert len({row["student_answer"] for row in predictions}) > 1
    assert len({len(row["choices"]) for row in predictions}) > 1

    first = predictions[0]
    assert example.question_and_choices(student.prompt, student.prompt["example"]) == (
        first["question"],
        first["choices"],
    )
    assert example.question_and_choices(student.prompt, "A question?") == ("A question?", [])

    task = yaml.safe_load((tmp_path / "out" / "lm_eval" / "distill_jsonl.yaml").read_text())
    assert task["doc_to_choice"] == "choices"
    for row, exported in zip(predictions, lines(tmp_path / "out" / "lm_eval" / "distill_jsonl.jsonl"), strict=True):
        assert exported["choices"] == [f" {choice}</s>" for choice in row["choices"]]
        assert exported["gold"] == [row["choices"].index(row["gold"])]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- Choices: those of each question" in card
    assert '"choices": ["A", "B"]' in message
