"""What counting words gives: TF-IDF and logistic regression on the targets that a student's losses on answers read.

A student that is not better has learned no more than which words go with which answer. Order beyond pairs of words is
not seen, and languages without spaces between words are poorly served.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from distill.records import Annotation, Example

Source = Literal["labels", "teacher", "soft"]

STRENGTHS = (
    0.1,
    1.0,
    10.0,
    100.0,
)  # values of C, the inverse of regularization; of equally good ones the first is taken
WITHOUT_VALIDATION = 1.0  # the C where validation has no answers
NEGLIGIBLE = 0.01  # probabilities below are left out of soft targets: each takes as long as a text more
MAX_TERMS, MAX_WEIGHTS = (
    100_000,
    1_000_000,
)  # of the most frequent words and pairs of words, and of them for all choices
MAX_ITERATIONS = 1_000
_WORDS = r"\b\w+\b"  # single letters too; scikit-learn's default leaves them out


@dataclass(frozen=True)
class Targets:
    """Texts, and how much each choice weighs as the answer to each; the weights sum to the number of texts.

    `counts` has the number of texts with a target of each source.
    """

    texts: tuple[str, ...]
    weight_EC: np.ndarray
    counts: Mapping[Source, int]

    def digest(self, validation: Sequence[tuple[str, int]]) -> str:
        """Hash of all that decides a bag of words: these targets, and the validation answers that choose C."""
        content = hashlib.blake2b(repr((self.texts, *validation)).encode("utf-8", "surrogatepass"), digest_size=6)
        content.update(self.weight_EC.tobytes())
        return f"bow-{content.hexdigest()}"


@dataclass(frozen=True)
class BagOfWords:
    """A fitted vectorizer and classifier of scikit-learn; `num_choices` counts those without a target too."""

    vectorizer: Any
    classifier: Any
    num_choices: int

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """Return the probability of each choice for each text, [E, C]."""
        probability_EC = np.zeros((len(texts), self.num_choices))
        probability_EC[:, self.classifier.classes_] = self.classifier.predict_proba(self.vectorizer.transform(texts))
        return probability_EC

    @property
    def strength(self) -> float:
        """The C that was chosen."""
        return float(self.classifier.C)

    @property
    def num_parameters(self) -> int:
        """Number of weights, with the inverse document frequencies."""
        return int(self.classifier.coef_.size + self.classifier.intercept_.size + self.vectorizer.idf_.size)

    @property
    def size_bytes(self) -> int:
        """Bytes of the weights and of the words."""
        words = sum(len(term.encode()) for term in self.vectorizer.vocabulary_)
        return int(self.classifier.coef_.itemsize * self.num_parameters + words)


def targets_of(
    examples: Sequence[Example],
    answer_of: Callable[[str], Annotation | None],
    soft_of: Callable[[str], Annotation | None],
    choices: Sequence[str],
    weights: Mapping[Source, float],
) -> Targets:
    """Return what losses with these weights read of examples, where `answer_of` and `soft_of` give annotations by id.

    A loss is a mean over the examples that have its target, so its weight is divided among them. A distribution counts
    at temperature 1, where a student that has learned it at any temperature reproduces it.
    """
    places = {choice: place for place, choice in enumerate(choices)}
    parts = {source: np.zeros((len(examples), len(choices))) for source, weight in weights.items() if weight > 0}
    for row, example in enumerate(examples):
        read = _read(example, answer_of(example.id), soft_of(example.id), places)
        for source, target in read.items():
            if source in parts:
                parts[source][row] = target
    counts = {source: int(part.any(1).sum()) for source, part in parts.items()}
    parts = {source: part * weights[source] / counts[source] for source, part in parts.items() if counts[source]}
    weight_EC: np.ndarray = np.sum([np.zeros((len(examples), len(choices))), *parts.values()], axis=0)
    kept = weight_EC.sum(1).nonzero()[0]
    texts = tuple(examples[row].text for row in kept)
    return Targets(texts, weight_EC[kept] * len(texts) / (weight_EC.sum() or 1.0), counts)


def _read(
    example: Example, answer: Annotation | None, soft: Annotation | None, places: Mapping[str, int]
) -> dict[Source, np.ndarray]:
    """Return the distributions over the choices that an example has, by source."""
    read = dict[Source, np.ndarray]()
    taught = example.answer or (answer.whole_answer if answer else None)
    if taught is not None and taught in places:
        read["teacher" if example.answer is None else "labels"] = np.eye(len(places))[places[taught]]
    if soft and soft.choice_logprobs:
        read["soft"] = _without_negligible(np.array(soft.choice_logprobs))
    return read


def _without_negligible(logprob_C: np.ndarray) -> np.ndarray:
    probability_C: np.ndarray = np.exp(logprob_C - logprob_C.max())
    probability_C[probability_C < NEGLIGIBLE * probability_C.sum()] = 0
    probability_C /= probability_C.sum()
    return probability_C


def can_be_fitted(targets: Targets) -> bool:
    """Whether there is something to tell apart, and a word to tell it by."""
    return int(targets.weight_EC.any(0).sum()) > 1 and any(c.isalnum() for text in targets.texts for c in text)


def fit(targets: Targets, validation: Sequence[tuple[str, int]], num_choices: int) -> BagOfWords:
    """Fit a bag of words with the C that gives the most right answers to `validation`, texts and places of choices."""
    from sklearn.feature_extraction.text import TfidfVectorizer  # takes a second, so only where it is used

    max_terms = min(MAX_TERMS, MAX_WEIGHTS // num_choices)
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, max_features=max_terms, token_pattern=_WORDS)
    counted = vectorizer.fit_transform(targets.texts)
    if not validation:
        return BagOfWords(vectorizer, _classifier(counted, targets.weight_EC, WITHOUT_VALIDATION), num_choices)
    texts, answers = zip(*validation, strict=True)
    held_out = vectorizer.transform(texts)
    classifiers = [_classifier(counted, targets.weight_EC, strength) for strength in STRENGTHS]
    best = max(classifiers, key=lambda classifier: int((classifier.predict(held_out) == np.array(answers)).sum()))
    return BagOfWords(vectorizer, best, num_choices)


def _classifier(counted: Any, weight_EC: np.ndarray, strength: float) -> Any:
    """Fit the classifier: a text stands there once for each choice of which it has a target, with its weight."""
    from sklearn.linear_model import LogisticRegression

    texts, choices = weight_EC.nonzero()
    classifier = LogisticRegression(C=strength, max_iter=MAX_ITERATIONS)
    return classifier.fit(counted[texts], choices, sample_weight=weight_EC[texts, choices])
