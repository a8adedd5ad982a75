"""Questions with choices of their own are answered by the most likely of these."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from distill.evaluation.answers import Evaluation
from distill.evaluation.metrics import score
from distill.prompts.rendering import Prompts
from distill.records import Example
from tests.conftest import examples
from tests.teachers.conftest import FreeText

CHOICES = [("has", "gets back"), ("1", "10", "100"), ("good", "good but slow", "bad", "get")]
QUESTIONS = [Example(e.question, CHOICES[i % 3][i % 2], choices=CHOICES[i % 3]) for i, e in enumerate(examples(6))]


def plain(model: Any, prompts: Prompts, example: Example) -> torch.Tensor:
    before, scores = [*prompts.prefix("answer"), *prompts.question(example, "answer")], []
    for choice in example.choices:
        ids = torch.tensor(prompts.answer_ids(choice))
        with torch.no_grad():
            logits_TV = model(torch.tensor([[*before, *ids.tolist()]])).logits[0, len(before) - 1 : -1, :320]
        scores.append(logits_TV.log_softmax(-1)[range(len(ids)), ids].sum())
    return torch.stack(scores).softmax(-1)


def test_an_answer_is_the_most_likely_of_the_questions_own_choices(prompts: Prompts, student_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(student_folder).eval()
    evaluation = Evaluation(model, prompts, FreeText(), "direct", 40)
    predictions = evaluation.predict(QUESTIONS, {})
    for example, prediction in zip(QUESTIONS, predictions, strict=True):
        probability_C = plain(model, prompts, example)
        assert prediction.answer == example.choices[int(probability_C.argmax())]
        assert prediction.confidence == pytest.approx(float(probability_C.max()), abs=1e-4)
        assert prediction.is_correct == (prediction.answer == example.answer)
        assert prediction.as_row()["choices"] == list(example.choices)
        (alone,) = evaluation.predict([example], {})
        assert (alone.answer, alone.written_answer) == (prediction.answer, prediction.written_answer)
    assert score(predictions)["ece"] is not None
    assert evaluation.answering()(QUESTIONS[0]) == 0  # choosing writes nothing
