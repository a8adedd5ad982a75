"""CommonsenseQA-like rows through the whole command; its figures are those of a plain second implementation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import run, tiny_overrides

pytestmark = pytest.mark.slow

THINGS = ["hat", "shoe", "warm coat", "boat", "very big umbrella", "spoon"]


def rows() -> list[dict[str, Any]]:
    """Rows of 2 to 5 choices in the layout of the hub."""
    made = []
    for number in range(120):
        size = 2 + number % 4
        texts = [THINGS[(number + k) % len(THINGS)] for k in range(size)]
        choices = {"label": list("ABCDE"[:size]), "text": texts}
        key = "ABCDE"[number % size]
        made.append({"id": f"{number}", "question": f"What is {number}?", "choices": choices, "answerKey": key})
    return made


def plain_answers(folder: Path, predictions: list[dict[str, Any]]) -> list[tuple[str, float]]:
    """The most likely of each question's own choices and its probability, by one forward pass for each choice."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    answers = []
    for row in predictions:
        before = [*ids("Question:"), *ids(f" {row['question']}"), *ids("\n"), *ids("Answer:")]
        scores = []
        for choice in row["choices"]:
            target = [*ids(f" {choice}"), tokenizer.eos_token_id]
            with torch.no_grad():
                logits_TV = model(torch.tensor([[*before, *target]])).logits[0, len(before) - 1 : -1, : len(tokenizer)]
            scores.append(sum(float(logits_TV.log_softmax(-1)[n, token]) for n, token in enumerate(target)))
        probability_C = torch.tensor(scores).softmax(-1)
        answers.append((row["choices"][int(probability_C.argmax())], float(probability_C.max())))
    return answers


def calibration_error(pairs: list[tuple[float, bool]]) -> float:
    """Mean distance of confidence and accuracy over ten bins of equal width, weighted by their sizes."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for confidence, is_correct in pairs:
        bins.setdefault(min(9, int(confidence * 10)), []).append((confidence, is_correct))
    gaps = [abs(sum(c for c, _ in members) - sum(right for _, right in members)) for members in bins.values()]
    return math.fsum(gaps) / len(pairs)


@pytest.mark.parametrize("answer", ["letter", "text"])
def test_rows_of_unlike_choices_are_trained_on_and_evaluated(
    answer: str, tmp_path: Path, teacher_folder: Path, student_folder: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    tiny = [o for o in tiny_overrides(tmp_path, teacher_folder, student_folder) if not o.startswith(("task", "root="))]
    tiny += [
        "task=jsonl",
        "task.path=rows.jsonl",
        "task.choices=choices",
        "task.answer=answerKey",
        "prompt.num_shots=0",
    ]
    tiny += [f"task.options.answer={answer}", "task.examples.num_test=24", "task.examples.num_labelled=40"]
    tiny += (
        ["teacher.calibrate=12"] if answer == "letter" else ["teacher.calibrate=0", "task.options.show='\n- {text}'"]
    )
    tiny += ["loss=[answer,kl]", "trainer.max_steps=30", "batch_size=8", "optim.optimizer.lr=0.01"]
    done = run(tmp_path, *tiny, "evaluate_before=false", "max_new_tokens=6")
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    predictions = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert {len(row["choices"]) for row in predictions} == {2, 3, 4, 5}

    plain = plain_answers(folder / "student", predictions)
    assert [row["student_answer"] for row in predictions] == [answer for answer, _ in plain]
    assert [row["student_confidence"] for row in predictions] == pytest.approx([p for _, p in plain], abs=1e-4)
    right = [answer == row["gold"] for (answer, _), row in zip(plain, predictions, strict=True)]
    results = json.loads((folder / "results.json").read_text())["rows"]
    assert results["student"]["accuracy"] == sum(right) / len(right)
    confidences = [confidence for _, confidence in plain]
    assert results["student"]["ece"] == pytest.approx(
        calibration_error(list(zip(confidences, right, strict=True))), abs=1e-3
    )
    chance = math.fsum(1 / len(row["choices"]) for row in predictions) / len(predictions)
    assert f"a random choice | {100 * chance:.1f}" in " ".join((folder / "report.md").read_text().split())

    again = run(tmp_path, *tiny, "evaluate_before=false", "max_new_tokens=6", "seed=1")
    assert "the teacher is not loaded (0 calls)" in again.stderr
