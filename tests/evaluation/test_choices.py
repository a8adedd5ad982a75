"""The most likely choice is the one that a student writes, also where one choice begins another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from distill.evaluation.answers import Evaluation
from distill.evaluation.metrics import score
from distill.prompts.rendering import Prompts
from distill.records import Example
from tests.teachers.conftest import Verbs


def task_of(choices: Sequence[str]) -> Any:
    def read_answer(self: Any, text: str, example: Example) -> str:
        assert text.strip() in choices
        return text.strip()

    return type("Choosing", (Verbs,), {"choices": tuple(choices), "read_answer": read_answer})()


def trained(folder: Path, prompts: Prompts, examples: Sequence[Example]) -> Any:
    """A model that has learned the answers to a few questions."""
    model = AutoModelForCausalLM.from_pretrained(folder).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    rows = [prompts.answer_prompt(example, str(example.answer)) for example in examples]
    for _ in range(30):
        for row in rows:
            ids, (start, stop) = torch.tensor([row.ids]), row.spans["answer"]
            logits_TV = model(ids).logits[0, start - 1 : stop - 1]
            torch.nn.functional.cross_entropy(logits_TV, ids[0, start:stop]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize(
    "choices",
    [
        pytest.param(("good", "good but slow"), marks=pytest.mark.slow),
        ("1", "10", "100"),
        pytest.param(("no, thanks", "no"), marks=pytest.mark.slow),
        ("late", "later", "la"),
    ],
)
def test_the_chosen_answer_is_the_written_one(choices: tuple[str, ...], prompts: Prompts, student_folder: Path) -> None:
    examples = [Example(f"Case {index}?", choices[index % len(choices)]) for index in range(2 * len(choices))]
    model = trained(student_folder, prompts, examples)
    evaluation = Evaluation(model, prompts, task_of(choices), "direct", 6)
    predictions = evaluation.predict(examples, {})
    assert [p.written_answer for p in predictions] == [e.answer for e in examples]
    assert [p.answer for p in predictions] == [e.answer for e in examples]
    assert min(p.confidence or 0 for p in predictions) > 0.6
    wrong = [replace(e, answer=choices[(index + 1) % len(choices)]) for index, e in enumerate(examples)]
    accepting = [replace(e, accepted=(str(example.answer),)) for e, example in zip(wrong, examples, strict=True)]
    figures = [score(evaluation.predict(part, {})) for part in (examples, wrong, accepting)]
    assert [figure["accuracy"] for figure in figures] == [1, 0, 1]
    assert figures[2]["ece"] == figures[0]["ece"] < 0.4 < 0.6 < figures[1]["ece"]
