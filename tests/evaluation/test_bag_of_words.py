"""The bag of words reads what the losses on answers read, and is what scikit-learn fits on it."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from distill.evaluation.bag_of_words import BagOfWords, Source, Targets, can_be_fitted, fit, targets_of
from distill.records import Annotation, Example, Message

CHOICES = ("bad", "good", "mixed")
OF_CHOICE = {"bad": "dull slow flat", "good": "warm funny bright", "mixed": "uneven odd long"}


def sentences(number: int, name: str, *, noise: float = 0.3) -> list[tuple[str, str]]:
    """Sentences with their answers: words of the answer among words of all, and some of a wrong answer."""
    draw, made = random.Random(name), list[tuple[str, str]]()
    for _ in range(number):
        answer = draw.choice(CHOICES)
        source = draw.choice(CHOICES) if draw.random() < noise else answer
        words = [
            *draw.sample(OF_CHOICE[source].split(), 2),
            *draw.choices(["a", "film", "with", "the", "plot", "it", "is", "not"], k=5),
        ]
        draw.shuffle(words)
        made.append((" ".join(words), answer))
    return made


def distribution(*probabilities: float) -> Annotation:
    """A teacher's choice with these probabilities."""
    answer = CHOICES[int(np.argmax(probabilities))]
    return Annotation("key", {}, answer, choice_logprobs=tuple(map(math.log, probabilities)))


LABELLED, UNLABELLED = Example("a label", "bad"), Example("no label")
ANNOTATIONS = {LABELLED.id: distribution(0.2, 0.7, 0.1), UNLABELLED.id: distribution(0.1, 0.3, 0.6)}


def targets(examples: Sequence[Example], **weights: float) -> Targets:
    by_source: dict[Source, float] = dict(weights)  # type: ignore[arg-type]
    return targets_of(examples, ANNOTATIONS.get, ANNOTATIONS.get, CHOICES, by_source)


@pytest.mark.parametrize(
    ("weights", "texts", "expected"),
    [
        ({"labels": 1.0}, ["a label"], [[1, 0, 0]]),
        ({"labels": 0.1}, ["a label"], [[1, 0, 0]]),  # a factor of the whole loss changes nothing
        ({"teacher": 1.0}, ["no label"], [[0, 0, 1]]),
        ({"labels": 1.0, "teacher": 1.0}, ["a label", "no label"], [[1, 0, 0], [0, 0, 1]]),
        ({"soft": 2.0}, ["a label", "no label"], [[0.2, 0.7, 0.1], [0.1, 0.3, 0.6]]),
        ({"labels": 1.0, "soft": 0.0}, ["a label"], [[1, 0, 0]]),
        # of 4 parts of the loss 1 is the mean over one label, and 3 are the mean over two distributions
        ({"labels": 1.0, "soft": 3.0}, ["a label", "no label"], [[0.65, 0.525, 0.075], [0.075, 0.225, 0.45]]),
    ],
)
def test_a_target_is_what_the_losses_read_by_their_weights(
    weights: dict[str, float], texts: list[str], expected: list[list[float]]
) -> None:
    read = targets([LABELLED, UNLABELLED], **weights)
    assert read.texts == tuple(texts)
    np.testing.assert_allclose(read.weight_EC, expected, atol=1e-12)


def test_sources_are_counted_by_the_texts_that_have_them() -> None:
    read = targets([LABELLED, UNLABELLED, Example("not annotated")], labels=1.0, teacher=1.0, soft=1.0)
    assert read.counts == {"labels": 1, "teacher": 1, "soft": 2}
    assert "not annotated" not in read.texts


def test_soft_targets_are_those_of_their_own_teacher() -> None:
    second = {UNLABELLED.id: distribution(0.8, 0.1, 0.1)}
    read = targets_of([UNLABELLED], ANNOTATIONS.get, second.get, CHOICES, {"teacher": 1.0, "soft": 1.0})
    np.testing.assert_allclose(read.weight_EC, [[0.4, 0.05, 0.55]])


def test_negligible_probabilities_are_left_out() -> None:
    annotation = distribution(0.005, 0.4, 0.595)
    read = targets_of([UNLABELLED], lambda _: None, lambda _: annotation, CHOICES, {"soft": 1.0})
    np.testing.assert_allclose(read.weight_EC, [[0, 0.4 / 0.995, 0.595 / 0.995]])


def test_an_answer_that_was_cut_off_is_no_target() -> None:
    cut = Annotation("key", {}, "good", is_truncated=True, text="good")
    assert targets_of([UNLABELLED], lambda _: cut, lambda _: None, CHOICES, {"teacher": 1.0}).texts == ()


def test_the_turns_before_a_question_are_read() -> None:
    example = Example("and now?", "bad", history=(Message("user", "it was dull"), Message("assistant", "oh")))
    assert targets([example], labels=1.0).texts == ("it was dull\noh\nand now?",)


def pipeline(strength: float) -> Any:
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    return make_pipeline(words, LogisticRegression(C=strength, max_iter=5000))


def places(rows: Sequence[tuple[str, str]]) -> list[tuple[str, int]]:
    return [(text, CHOICES.index(answer)) for text, answer in rows]


def refitted(train: Targets, validation: Sequence[tuple[str, int]]) -> tuple[float, Any]:
    """A second way: the classifier of every C in a pipeline, each text there once for each choice."""
    vectorizer = pipeline(1.0)[0].fit(train.texts)
    best: tuple[int, float, Any] = (-1, 0.0, None)
    for strength in (0.1, 1.0, 10.0, 100.0):
        rows = [(t, c, w) for t, row in zip(train.texts, train.weight_EC, strict=True) for c, w in enumerate(row) if w]
        texts, answers, weights = map(list, zip(*rows, strict=True))
        model = LogisticRegression(C=strength, max_iter=5000)
        model.fit(vectorizer.transform(texts), answers, sample_weight=weights)
        right = sum(model.predict(vectorizer.transform([text]))[0] == answer for text, answer in validation)
        if right > best[0]:
            best = (right, strength, make_pipeline(vectorizer, model))
    return best[1:]


def soft_rows(number: int, name: str) -> tuple[list[Example], dict[str, Annotation]]:
    """Examples of which some have labels, and a teacher's distributions, often wrong, for all."""
    draw = np.random.default_rng(number)
    rows = dict(sentences(number, name))
    examples = [Example(text, answer if place % 4 == 0 else None) for place, (text, answer) in enumerate(rows.items())]
    return examples, {
        example.id: distribution(
            *(0.5 * draw.dirichlet([1, 1, 1]) + 0.5 * np.eye(3)[CHOICES.index(answer)] * 0.9 + 1 / 60)
        )
        for example, answer in zip(examples, rows.values(), strict=True)
    }


@pytest.mark.parametrize("weights", [{"labels": 1.0}, {"soft": 1.0}, {"labels": 0.3, "soft": 1.0}], ids=str)
def test_it_is_the_classifier_that_scikit_learn_fits(weights: dict[Source, float]) -> None:
    examples, annotations = soft_rows(120, "train")
    train = targets_of(examples, annotations.get, annotations.get, CHOICES, weights)
    validation, test = (places(sentences(60, name)) for name in ("validation", "test"))
    bag = fit(train, validation, len(CHOICES))
    strength, expected = refitted(train, validation)
    assert bag.strength == strength
    texts = [text for text, _ in test]
    np.testing.assert_allclose(bag.probabilities(texts), expected.predict_proba(texts), atol=2e-3)


@pytest.mark.parametrize("name", ["a", "b", "c", "d"])
def test_regularization_is_chosen_on_validation(name: str) -> None:
    train = targets_of(
        [Example(*row) for row in sentences(40, f"{name}-train", noise=0.6)], *NONE, CHOICES, {"labels": 1.0}
    )
    validation = places(sentences(25, f"{name}-validation", noise=0.6))
    assert fit(train, validation, 3).strength == refitted(train, validation)[0]


NONE = ({}.get, {}.get)  # no annotations


def test_these_validations_do_not_all_choose_the_same() -> None:
    chosen = set()
    for name in "abcd":
        rows = [Example(*row) for row in sentences(40, f"{name}-train", noise=0.6)]
        train = targets_of(rows, *NONE, CHOICES, {"labels": 1.0})
        chosen.add(refitted(train, places(sentences(25, f"{name}-validation", noise=0.6)))[0])
    assert len(chosen) > 1


def test_without_answers_in_validation_the_default_is_taken() -> None:
    train = targets_of([Example(*row) for row in sentences(20, "few")], *NONE, CHOICES, {"labels": 1.0})
    assert fit(train, [], 3).strength == 1


def test_a_choice_without_a_target_has_no_probability_and_the_others_keep_their_places() -> None:
    rows = [Example(text, answer) for text, answer in sentences(60, "two") if answer != "bad"]
    bag = fit(targets_of(rows, *NONE, CHOICES, {"labels": 1.0}), [], 3)
    probability_EC = bag.probabilities(["warm funny bright", "uneven odd long"])
    assert probability_EC[:, 0].tolist() == [0, 0]
    assert probability_EC.argmax(1).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([("dull", "bad"), ("warm", "good")], True),
        ([("dull", "bad"), ("warm", "bad")], False),
        ([("?!", "bad"), ("...", "good")], False),
        ([], False),
    ],
)
def test_two_answers_and_a_word_are_needed(rows: list[tuple[str, str]], expected: bool) -> None:
    train = targets_of([Example(*row) for row in rows], *NONE, CHOICES, {"labels": 1.0})
    assert can_be_fitted(train) == expected


def test_its_size_is_that_of_its_weights_and_words() -> None:
    train = targets_of([Example("a b", "bad"), Example("b", "good")], *NONE, CHOICES, {"labels": 1.0})
    bag: BagOfWords = fit(train, [], 3)
    # the words a, b and "a b", with a weight and a frequency each, and an intercept
    assert bag.num_parameters == 7
    assert bag.size_bytes == 7 * 8 + 5


def test_the_digest_is_that_of_targets_and_validation() -> None:
    one, same, other = (targets([LABELLED, UNLABELLED], labels=1.0, soft=w) for w in (1.0, 1.0, 2.0))
    validation = [("text", 1)]
    assert one.digest(validation) == same.digest(validation)
    assert len({one.digest(validation), other.digest(validation), one.digest([("text", 0)])}) == 3
