"""A teacher's records as a classifier learns them: its distribution over the choices is the soft target of a class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from distill.annotation.reader import AnnotationReader
from distill.cache.store import Store
from distill.errors import CacheError
from distill.prompts.classes import ClassPrompts
from distill.records import Annotation, Example, ScoredTokens, SoftTargets, SoftTargetsKey, Span, Target
from distill.tasks import Task


@dataclass(frozen=True)
class ChoiceReader:
    """Reads annotations whose targets are classes; see `prompts.classes`.

    A class is predicted from the text alone, so its soft target is the same whatever class it is a target for. It
    belongs to the gold answer where there is one, as the student learns it.
    """

    annotations: AnnotationReader
    prompts: ClassPrompts

    @property
    def task(self) -> Task:
        """The task by whose rules answers are read."""
        return self.annotations.task

    def find(self, example_id: str, span: Span) -> Annotation | None:
        """Return the annotation, or None if none was requested."""
        annotation = self.annotations.find_words(example_id, span)
        if annotation is None:
            return None
        request = self.annotations.requests[example_id, span]
        return replace(annotation, targets=self._targets(annotation, request.example))

    find_words = find

    def scored(self, key: str, example: Example) -> dict[Span, ScoredTokens]:
        """Return nothing: an annotation that has soft targets comes with them."""
        return {}

    def largest_soft_id(self, places: Sequence[SoftTargetsKey]) -> int:
        """Return the last class, whose probability every soft target has."""
        return len(self.prompts.labels) - 1 if places else -1

    def _targets(self, annotation: Annotation, example: Example) -> dict[Span, Target]:
        answer = example.answer or annotation.answer
        if answer is None or not annotation.choice_logprobs:
            return {}
        return {"answer": Target(self.prompts.answer_ids(answer), choice_targets([annotation]))}


@dataclass(frozen=True)
class ReadChoices:
    """Reads the soft targets of a batch of classes from the cache."""

    store: Store

    def __call__(self, keys: Sequence[SoftTargetsKey]) -> SoftTargets:
        """Return a distribution over all classes for each of the records."""
        return choice_targets([self.store.words(key) for key, _ in keys])


def choice_targets(annotations: Sequence[Annotation]) -> SoftTargets:
    """Return the distributions over the choices, complete: every class has its probability, and nothing is left."""
    logprobs_NC = np.array([annotation.choice_logprobs for annotation in annotations], np.float64)
    if logprobs_NC.ndim != 2 or not logprobs_NC.size:
        raise CacheError("the cache has no scores of the task's choices for some examples; annotate again")
    num_rows, size = logprobs_NC.shape
    logprobs_NC -= np.logaddexp.reduce(logprobs_NC, axis=1, keepdims=True)
    ids_E = np.tile(np.arange(size, dtype=np.int32), num_rows)
    exact_N = np.full(num_rows, size, np.int32)
    return SoftTargets(ids_E, logprobs_NC.astype(np.float32).ravel(), np.zeros(num_rows, np.float32), exact_N)
