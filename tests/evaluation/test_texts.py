"""Free texts: their likelihood, divergence, wording and length, against plain forward passes and sacrebleu itself."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sacrebleu import sentence_chrf

from distill.errors import ConfigError
from distill.evaluation import texts
from distill.evaluation.answers import Evaluation, _teacher_measures
from distill.evaluation.metrics import Prediction, score
from distill.evaluation.texts import (
    Likelihood,
    TextMeasures,
    Wording,
    chrf,
    require_text_measures,
    rouge_l,
    score_texts,
    wording,
)
from distill.models import loading
from distill.models.batches import BatchLimit
from distill.prompts.rendering import Prompts
from distill.records import Annotation, Example, SoftTargets, Target
from distill.tasks.answers import AnswerFormat

GOLD = ["A small house.\n\nIt stands alone:\n  - by the sea", "Two\nlines", "one line of words, and é"]
TEACHER = ["A house.\nIt is small, and it stands alone on the shore of a sea", "Three\n\nlines of it", None]
EXAMPLES = [Example(f"Tell me about {k}", gold) for k, gold in enumerate(GOLD)]


class TextTask:
    """A task of free texts."""

    version, choices, is_free_text = "1", (), True
    _format = AnswerFormat(kind="text", pattern=None, choices=[])

    def splits(self) -> Any:
        raise NotImplementedError

    def shots(self) -> Sequence[Example]:
        return ()

    def read_answer(self, text: str, example: Example) -> str:
        return self._format.read(text)

    def value(self, answer: str) -> str:
        return answer

    def is_same(self, answer: str, reference: str) -> bool:
        return answer == reference


@pytest.fixture(scope="module")
def student(student_folder: Path) -> Any:
    return loading.load(student_folder, torch.float32).eval()


@pytest.fixture(scope="module")
def teacher(teacher_folder: Path) -> Any:
    return loading.load(teacher_folder, torch.float32).eval()


def f_measure(text: str, reference: str) -> float:
    """ROUGE-L from its definition: the longest subsequence of the shorter list of words that the other has too."""
    mine, other = ([word.strip(",.!?:-").casefold() for word in side.split()] for side in (text, reference))
    mine, other = ([word for word in side if word] for side in (mine, other))

    def is_within(words: Sequence[str]) -> bool:
        rest = iter(other)
        return all(word in rest for word in words)

    lengths = (n for n in range(len(mine), 0, -1) if any(map(is_within, itertools.combinations(mine, n))))
    return 200 * next(lengths, 0) / max(1, len(mine) + len(other))


@torch.no_grad()
def plain_logprobs(model: Any, prompts: Prompts, example: Example, target: Sequence[int]) -> torch.Tensor:
    """Log-probabilities at each token of a target, from one forward pass over the whole sequence."""
    before = [*prompts.prefix("answer"), *prompts.question(example, "answer")]
    logits_TV = model(torch.tensor([[*before, *target]])).logits[0, :, : prompts.vocabulary_size]
    return logits_TV[len(before) - 1 : -1].double().log_softmax(-1)


def dense(logprobs_NV: torch.Tensor) -> SoftTargets:
    num_N, size = np.full(len(logprobs_NV), logprobs_NV.shape[1]), logprobs_NV.numel()
    ids_E = np.arange(size) % logprobs_NV.shape[1]
    flat = logprobs_NV.float().numpy().reshape(-1)
    return SoftTargets(ids_E, flat, np.zeros(len(num_N), np.float32), num_N)


def annotations(teacher: Any, prompts: Prompts) -> dict[str, Annotation]:
    """The teacher's texts with its whole distributions; of the last only a text that was cut off."""
    annotated = {EXAMPLES[2].id: Annotation("2", {}, "cut of", text="cut of", is_truncated=True)}
    for example, text in zip(EXAMPLES[:2], TEACHER[:2], strict=True):
        ids = prompts.answer_ids(text)
        soft = dense(plain_logprobs(teacher, prompts, example, ids))
        annotated[example.id] = Annotation(text, {"answer": Target(ids, soft)}, text, text=text)
    return annotated


def predicted(
    student: Any, prompts: Prompts, annotated: Any, size: int = 2, examples: Sequence[Example] = EXAMPLES
) -> list[Prediction]:
    return Evaluation(student, prompts, TextTask(), "direct", 12, BatchLimit(size)).predict(examples, annotated)


@pytest.mark.parametrize("size", [1, 3])
def test_likelihood_and_divergence_equal_plain_forward_passes(
    size: int, student: Any, teacher: Any, prompts: Prompts
) -> None:
    annotated = annotations(teacher, prompts)
    for prediction, example in zip(predicted(student, prompts, annotated, size), EXAMPLES, strict=True):
        ids = prompts.answer_ids(example.answer or "")
        logprobs = plain_logprobs(student, prompts, example, ids)
        measured = prediction.text
        assert measured.gold.num_tokens == len(ids)
        assert measured.gold.nats == pytest.approx(-float(logprobs[range(len(ids)), ids].sum()), rel=1e-5)
        assert measured.gold_bytes == len(example.answer.encode())
        target = annotated[example.id].targets.get("answer")
        assert (measured.teacher is None) == (target is None)
        if target:
            ids = target.token_ids
            p, q = (plain_logprobs(model, prompts, example, ids) for model in (teacher, student))
            assert measured.teacher.nats == pytest.approx(-float(q[range(len(ids)), ids].sum()), rel=1e-5)
            assert measured.teacher.kl == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-4)
            accepted = pytest.approx(float(torch.minimum(p, q).exp().sum()), rel=1e-5)
            assert (measured.teacher.accepted_low, measured.teacher.accepted_high) == (accepted, accepted)


def test_a_model_does_not_diverge_from_itself_and_its_likelihood_is_that_of_the_words(
    teacher: Any, prompts: Prompts
) -> None:
    annotated = annotations(teacher, prompts)
    own = [p.text for p in predicted(teacher, prompts, annotated)][:2]
    assert max(abs(m.teacher.kl) for m in own) < 1e-4
    for measured, example in zip(own, EXAMPLES, strict=False):
        ids = annotated[example.id].targets["answer"].token_ids
        assert measured.teacher.nats == pytest.approx(
            -float(plain_logprobs(teacher, prompts, example, ids)[range(len(ids)), ids].sum()), rel=1e-5
        )


def test_without_soft_targets_the_teachers_words_have_a_likelihood_and_no_divergence(
    student: Any, teacher: Any, prompts: Prompts
) -> None:
    annotated = annotations(teacher, prompts)
    words = {id_: replace(annotation, targets={}) for id_, annotation in annotated.items()}
    for with_soft, alone in zip(
        predicted(student, prompts, annotated), predicted(student, prompts, words), strict=True
    ):
        if with_soft.text.teacher is None:
            assert alone.text.teacher is None
        else:
            nats, num_tokens, *closeness = alone.text.teacher
            assert (nats, num_tokens) == (pytest.approx(with_soft.text.teacher.nats), with_soft.text.teacher.num_tokens)
            assert closeness == [None, None, None]


def test_texts_are_compared_by_sacrebleu_and_are_not_right_or_wrong(
    student: Any, teacher: Any, prompts: Prompts
) -> None:
    annotated = annotations(teacher, prompts)
    for prediction, example in zip(predicted(student, prompts, annotated), EXAMPLES, strict=True):
        text, said = prediction.answer or "", annotated[example.id].answer or ""
        assert prediction.text.wording.chrf == sentence_chrf(text, [example.answer]).score
        assert prediction.text.teacher_wording.chrf == sentence_chrf(text, [said]).score
        assert prediction.text.length == (len(prompts.encode(text)) if text else 0)
        row = prediction.as_row()
        assert row["is_correct"] is row["agrees"] is row["is_teacher_correct"] is None
    assert "accuracy" not in score(predicted(student, prompts, annotated))


def test_the_best_of_several_references_counts() -> None:
    assert chrf("a b c", ["nothing", "a b c"]) == 100
    assert chrf("", ["a b c"]) == 0
    assert rouge_l("a b c", ["nothing", "a b c", "a"]) == 100
    assert rouge_l("", ["a b c"]) == 0
    assert wording("a", []) is None


def test_each_text_is_compared_with_the_texts_of_its_own_row(student: Any, prompts: Prompts) -> None:
    written = [prediction.answer for prediction in predicted(student, prompts, {})]
    assert len(set(written)) == len(written)
    gold = [Example(example.question, text) for example, text in zip(EXAMPLES, written, strict=True)]
    others = {e.id: Annotation("", {}, text) for e, text in zip(gold, [*written[1:], written[0]], strict=True)}
    for prediction in predicted(student, prompts, others, examples=gold):
        assert prediction.text.wording == Wording(100, 100)
        assert prediction.text.teacher_wording.rouge_l < 100 > prediction.text.teacher_wording.chrf


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("the cat sat", "The CAT, the dog sat!", 100 * 2 * (3 / 3) * (3 / 5) / (3 / 3 + 3 / 5)),
        ("sat cat the", "the cat sat", 100 / 3),  # one word in the same order
        ("größe über alles", "Größe über nichts", 100 * 2 / 3),
        ("кот сидел", "кот спал", 50.0),
        ("!?", "...", 0.0),
    ],
)
def test_rouge_l_is_the_f_measure_of_words_in_the_same_order(text: str, reference: str, expected: float) -> None:
    assert rouge_l(text, [reference]) == pytest.approx(expected, rel=1e-5)
    assert f_measure(text, reference) == pytest.approx(expected, rel=1e-5)


def test_a_text_that_ran_into_the_limit_did_not_end_by_itself(student: Any, prompts: Prompts) -> None:
    written = [p.text.has_ended for p in predicted(student, prompts, {})]
    for example, has_ended in zip(EXAMPLES, written, strict=True):
        before = [*prompts.prefix("answer"), *prompts.question(example, "answer")]
        ids = student.generate(torch.tensor([before]), max_new_tokens=12, do_sample=False, eos_token_id=prompts.end)
        assert has_ended == (int(ids[0, -1]) == prompts.end)


def test_every_figure_of_texts_is_a_ratio_of_sums_or_a_mean_over_texts() -> None:
    first = TextMeasures(
        Likelihood(6.0, 3),
        10,
        Likelihood(8.0, 4, 2.0, 1.0, 3.0),
        25,
        6,
        2,
        True,
        Wording(80.0, 60.0),
        Wording(40.0, 30.0),
    )
    second = TextMeasures(Likelihood(3.0, 6), 20, Likelihood(2.0, 1), 15, 2, 6, False, Wording(20.0, 0.0), None)
    row = score_texts([first, second, TextMeasures()])
    assert row == {
        "num_examples": 3,
        "num_unmeasured": 1,
        "cross_entropy": 9 / 9,
        "cross_entropy_per_byte": 9 / 30,
        "teacher_cross_entropy": 10 / 5,
        "teacher_cross_entropy_per_byte": 10 / 40,
        "kl": 2 / 4,
        "acceptance_low": 1 / 4,
        "acceptance_high": 3 / 4,
        "chrf": 50.0,
        "teacher_chrf": 40.0,
        "rouge_l": 30.0,
        "teacher_rouge_l": 30.0,
        "length_ratio": 8 / 8,
        "ended": 0.5,
    }
    assert set(score_texts([TextMeasures()]).values()) == {1, None}


def test_the_likelihood_of_a_uniform_model_is_the_logarithm_of_its_vocabulary(student: Any, prompts: Prompts) -> None:
    weight = student.get_output_embeddings().weight
    kept = weight.data.clone()
    weight.data.zero_()
    measured = [p.text for p in predicted(student, prompts, {})]
    weight.data.copy_(kept)
    assert score_texts(measured)["cross_entropy"] == pytest.approx(math.log(prompts.vocabulary_size), rel=1e-6)


def test_the_teachers_text_is_compared_with_the_gold_text(prompts: Prompts) -> None:
    annotation = Annotation("", {}, "A small hut", text="A small hut", is_truncated=True)
    measured = _teacher_measures(prompts, EXAMPLES[0], annotation)
    assert measured.wording.chrf == sentence_chrf("A small hut", [GOLD[0]]).score
    assert (measured.has_ended, measured.gold) == (False, None)
    lengths = [len(prompts.encode(text)) for text in ("A small hut", GOLD[0])]
    assert [measured.length, measured.reference_length] == lengths


def test_a_text_that_the_model_cannot_hold_is_counted_as_not_measured(student: Any, prompts: Prompts) -> None:
    long = Example("What?", "word " * 1100)
    evaluation = Evaluation(student, prompts, TextTask(), "direct", 4)
    row = score(evaluation.predict([EXAMPLES[0], long], {}))
    assert (row["num_examples"], row["num_unmeasured"]) == (2, 1)


def test_without_sacrebleu_free_texts_are_refused_and_other_tasks_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"sacrebleu is missing; pip install 'distill\[text\]'"):
        require_text_measures(TextTask())
    task = TextTask()
    task.is_free_text = False  # type: ignore[misc]
    require_text_measures(task)
