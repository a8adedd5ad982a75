"""Questions with choices of their own: each is scored over its own, in any batch, and calibrated by letter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill.errors import ConfigError
from distill.prompts.rendering import Prompts
from distill.records import Annotation, Example
from distill.teachers.choices import calibrated_offsets
from tests.conftest import examples, grid
from tests.teachers.conftest import FreeText, Verbs, is_close, make_teacher

TEXTS = [("has", "gets back"), ("1", "10", "100"), ("good", "good but slow", "bad", "get")]
LETTERS = [tuple("ABCD"[:number]) for number in (2, 4, 3)]


def questions(own: Sequence[tuple[str, ...]], number: int = 4) -> list[Example]:
    """Questions of unlike lengths, and unlike numbers of choices."""
    return [Example(e.question, choices=own[i % len(own)]) for i, e in enumerate(examples(number))]


def teacher_of(folder: Path, prompts: Prompts, *calibration: Example, **settings: Any) -> Any:
    teacher = make_teacher(folder, prompts, *calibration, **{"task": FreeText()} | settings)
    teacher.load()
    return teacher


def annotated(teacher: Any, prompts: Prompts, asked: Sequence[Example]) -> list[Annotation]:
    return teacher.annotate([prompts.request(question, "answer") for question in asked])


def plain_scores(model: Any, prompts: Prompts, example: Example) -> np.ndarray:
    """Log-probabilities of an example's own choices as whole answers, each by a forward pass of its own."""
    before, scores = [*prompts.prefix("answer"), *prompts.question(example, "answer")], []
    for choice in example.choices:
        ids = torch.tensor(prompts.answer_ids(choice))
        with torch.no_grad():
            logits_TV = model(torch.tensor([[*before, *ids.tolist()]])).logits[0, len(before) - 1 : -1, :320]
        scores.append(float(logits_TV.log_softmax(-1)[range(len(ids)), ids].sum()))
    return np.array(scores)


@pytest.mark.parametrize("own", [TEXTS, LETTERS])
def test_each_question_is_scored_over_its_own_choices(
    own: list[tuple[str, ...]], prompts: Prompts, teacher_folder: Path
) -> None:
    teacher, asked = teacher_of(teacher_folder, prompts), questions(own)
    together = annotated(teacher, prompts, asked)
    for question, annotation in zip(asked, together, strict=True):
        scores = plain_scores(teacher._model, prompts, question)
        assert np.allclose(annotation.choice_logprobs, torch.tensor(scores).log_softmax(0), atol=1e-4)
        assert annotation.answer == question.choices[int(scores.argmax())]
        (alone,) = annotated(teacher, prompts, [question])
        assert is_close(alone, annotation)


@pytest.mark.parametrize("constrain", [False, True])
def test_own_choices_that_are_those_of_a_task_give_the_same(
    constrain: bool, prompts: Prompts, teacher_folder: Path
) -> None:
    asked = questions([Verbs.choices])
    shared = [Example(question.question) for question in asked]
    fixed = teacher_of(teacher_folder, prompts, *shared, task=Verbs(), constrain=constrain)
    own = teacher_of(teacher_folder, prompts, *asked, constrain=constrain)
    for left, right in zip(annotated(fixed, prompts, shared), annotated(own, prompts, asked), strict=True):
        assert left.key != right.key
        assert is_close(replace(left, key=right.key), right)


@pytest.mark.parametrize("constrain", [False, True])
def test_soft_targets_along_own_choices_give_their_calibrated_probabilities(
    constrain: bool, prompts: Prompts, teacher_folder: Path
) -> None:
    asked = questions([("good", "good but slow", "bad"), ("good", "good but slow")], 4)
    teacher = teacher_of(teacher_folder, prompts, constrain=constrain)
    teacher._calibrated, teacher._offsets = ("good", "good but slow", "bad"), {"good": 0.5, "good but slow": -0.7}
    for question in asked:
        along = []
        for choice in question.choices:
            (annotation,) = annotated(teacher, prompts, [replace(question, answer=choice)])
            target = annotation.targets["answer"]
            along.append(grid(target.soft)[1][range(len(target.token_ids)), target.token_ids].sum())
        expected = torch.tensor(np.array(along)).log_softmax(0)
        assert np.allclose(annotation.choice_logprobs, expected, atol=1e-4)
        assert constrain == (abs(np.exp(along).sum() - 1) < 1e-4)


def test_letters_are_calibrated_over_the_questions_that_have_them(prompts: Prompts, teacher_folder: Path) -> None:
    asked = questions(LETTERS, 8)
    teacher = teacher_of(teacher_folder, prompts, *asked)
    centred: dict[str, list[float]] = {letter: [] for letter in "ABCD"}
    for question in asked:
        scores = plain_scores(teacher._model, prompts, question)
        for letter, score in zip(question.choices, scores - scores.mean(), strict=True):
            centred[letter].append(float(score))
    typical = {letter: np.median(scores) for letter, scores in centred.items()}
    mean = np.mean(list(typical.values()))
    assert teacher._offsets == pytest.approx({letter: mean - score for letter, score in typical.items()}, abs=1e-4)
    (annotation,) = annotated(teacher, prompts, asked[:1])
    calibrated = plain_scores(teacher._model, prompts, asked[0]) + [teacher._offsets[letter] for letter in "AB"]
    assert np.allclose(annotation.choice_logprobs, torch.tensor(calibrated).log_softmax(0), atol=1e-4)


def test_a_choice_that_no_question_has_does_not_count() -> None:
    nan = float("nan")
    with_nan = calibrated_offsets(torch.tensor([[0.0, -2.0, nan], [-1.0, -2.0, nan], [-3.0, -9.0, -6.0]]))
    assert with_nan.tolist() == pytest.approx([-1.0 + 0.0, 1.0, 0.0], abs=1e-6)


def test_texts_cannot_be_calibrated(prompts: Prompts, teacher_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"teacher\.calibrate=4: .* set teacher\.calibrate=0"):
        make_teacher(teacher_folder, prompts, *questions(TEXTS), task=FreeText())


def test_own_choices_are_part_of_what_a_record_is_found_by(prompts: Prompts) -> None:
    keys = {prompts.request(Example("Which?", choices=own), "answer").key for own in [(), *TEXTS, *LETTERS]}
    assert len(keys) == 1 + len(TEXTS) + len(LETTERS)


def test_a_question_with_its_choices_at_its_end_is_not_cut(prompts: Prompts) -> None:
    short = Prompts(prompts.tokenizer, prompts.layout, (), max_length=20, too_long="cut")
    question = Example("Which of these many words is it? " * 3)
    assert len(short.question(question, "answer")) == 20
    with pytest.raises(ValueError, match="over max_length=20"):
        short.question(replace(question, choices=("A", "B")), "answer")
