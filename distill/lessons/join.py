"""Examples and annotations joined by key: what there is to learn from each, as token ids and places in the cache."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, final

import numpy as np

from distill.cache.store import Store
from distill.errors import CacheError
from distill.prompts.cues import Prompts
from distill.records import Annotation, CheckedRationale, Example, Place, Prompt, Request, SoftTargets, Span

AnswerMode = Literal["direct", "reasoned"]
Needed = frozenset[tuple[Span, str]]
Read = Callable[[Sequence[Place]], SoftTargets]


@dataclass(frozen=True)
class SoftPlace:
    """Where the soft targets of a span are in the cache."""

    place: Place
    num_positions: int


@dataclass(frozen=True)
class TrainingSequence:
    """One prompt with its targets: what of it is a gold label (the rest the teacher said), and where soft targets are.

    Soft targets stay in the cache until their batch is made.
    """

    prompt: Prompt
    labelled: frozenset[Span]
    soft: Mapping[Span, SoftPlace]

    def counts(self) -> Counter[tuple[Span, str]]:
        """Supervised positions per (span, source)."""
        found: Counter[tuple[Span, str]] = Counter()
        for span, (start, stop) in self.prompt.spans.items():
            found[span, "labels"] = (stop - start) * (span in self.labelled)
            found[span, "teacher"] = (stop - start) * (span not in self.labelled)
            found[span, "soft"] = self.soft[span].num_positions if span in self.soft else 0
        return found


@dataclass(frozen=True)
class Lesson:
    """What there is to learn from one example: the answer in it, and how sure the teacher is of its own."""

    example_id: str
    sequences: tuple[TrainingSequence, ...]
    answer: str | None = None
    confidence: float | None = None

    @property
    def num_tokens(self) -> int:
        """In a batch of lessons like this one, padding included."""
        return len(self.sequences) * max(len(sequence.prompt.ids) for sequence in self.sequences)

    def branched(self) -> Lesson:
        """The same lesson as one sequence: what its sequences begin with, and the rest of each as a branch of that."""
        if len(self.sequences) == 1:
            return self
        prompts = [sequence.prompt for sequence in self.sequences]
        # The token before a target is in its branch, as hidden states are found one place before what they predict.
        limit = min(start for prompt in prompts for start, _ in prompt.spans.values()) - 1
        columns = zip(*(prompt.ids[:limit] for prompt in prompts), strict=True)
        shared = sum(1 for _ in itertools.takewhile(lambda tokens: len(set(tokens)) == 1, columns))
        if not shared:
            return self
        branches = [prompt.ids[shared:] for prompt in prompts]
        starts = np.cumsum([shared, *map(len, branches)])[:-1].tolist()
        spans: dict[Span, tuple[int, int]] = {
            span: (start - shared + first, stop - shared + first)
            for prompt, first in zip(prompts, starts, strict=True)
            for span, (start, stop) in prompt.spans.items()
        }
        ids = (*prompts[0].ids[:shared], *itertools.chain.from_iterable(branches))
        labelled = frozenset[Span]().union(*(sequence.labelled for sequence in self.sequences))
        soft = {span: place for sequence in self.sequences for span, place in sequence.soft.items()}
        whole = TrainingSequence(Prompt(ids, spans, tuple(starts)), labelled, soft)
        return replace(self, sequences=(whole,))

    def counts(self) -> Counter[tuple[Span, str]]:
        """Supervised positions per (span, source)."""
        return sum((sequence.counts() for sequence in self.sequences), Counter())


@dataclass(frozen=True)
class Records:
    """What a teacher was asked about examples, by example id and span, and where it left what it said."""

    store: Store
    requests: Mapping[tuple[str, Span], Request]

    def find(self, example_id: str, span: Span) -> Annotation | None:
        """What it said, if it was asked."""
        request = self.requests.get((example_id, span))
        return self.store.read(request.key) if request else None


@final
class Join:
    """Makes lessons of examples: gold targets where they were given, else what the teacher left."""

    def __init__(
        self,
        *,
        prompts: Prompts,
        teacher: Records,
        soft_teacher: Records | None,
        rationales: Mapping[str, Sequence[CheckedRationale]],
        answer: AnswerMode,
        needed: Needed,
    ) -> None:
        """`rationales` are those to learn from, by example id; `needed` says which (span, source) the losses read.

        Soft targets are the teacher's own, or with a `soft_teacher`, which read the same words, all of them that one's.
        """
        self._prompts, self._teacher, self._soft_teacher = prompts, teacher, soft_teacher
        self._rationales, self._answer, self._needed = rationales, answer, needed
        self.skipped: dict[str, str] = {}

    def lessons(self, examples: Sequence[Example]) -> list[Lesson]:
        """Lessons of the examples that have something the losses read; `skipped` names the too long ones."""
        found = []
        for example in examples:
            try:
                annotation = self._teacher.find(example.id, "answer")
                sequences = [s for s in self._sequences(example, annotation) if self._is_needed(s)]
            except ValueError as error:
                self.skipped[example.id] = str(error)
                continue
            answer = example.answer or (annotation.answer if annotation else None)
            confidence = self._confidence(example, annotation)
            found += [Lesson(example.id, part, answer, confidence) for part in _dealt(sequences)]
        return found

    def _confidence(self, example: Example, annotation: Annotation | None) -> float | None:
        """The probability of the teacher's choice, or the share of its samples that agree."""
        if annotation and annotation.choice_logprobs:
            return max(annotation.choice_probabilities)
        rationales = self._rationales.get(example.id)
        return rationales[0].confidence if rationales else None

    def _sequences(self, example: Example, annotation: Annotation | None) -> Iterator[TrainingSequence]:
        if self._answer == "direct":
            yield from self._answer_alone(example, annotation)
        yield from self._reasoning(example)

    def _answer_alone(self, example: Example, annotation: Annotation | None) -> Iterator[TrainingSequence]:
        answer = example.answer or (annotation.answer if annotation else None)
        if answer is None:
            return
        soft = self._matching(
            self._expecting(example.id, "answer", annotation), "answer", self._prompts.answer_ids(answer)
        )
        labelled: frozenset[Span] = frozenset({"answer"} if example.answer is not None else ())
        yield TrainingSequence(self._prompts.answer_prompt(example, answer), labelled, soft)

    def _reasoning(self, example: Example) -> Iterator[TrainingSequence]:
        if example.rationale is not None:
            yield from self._reason(example, example.rationale, None, self._expecting(example.id, "rationale", None))
            return
        for place, checked in enumerate(self._rationales.get(example.id, ())):
            said, text = checked.annotation, checked.annotation.rationale
            if text is not None:
                expecting = self._expecting(example.id, "rationale", said)
                # A second teacher reads the first of an example's rationales alone.
                yield from self._reason(example, text, said.answer, None if place and self._soft_teacher else expecting)

    def _reason(
        self, example: Example, text: str, led_to: str | None, expecting: Annotation | None
    ) -> Iterator[TrainingSequence]:
        answer = example.answer or led_to
        soft = self._matching(expecting, "rationale", self._prompts.rationale_ids(text))
        labelled: set[Span] = {"rationale"}
        if self._answer == "direct":
            yield TrainingSequence(self._prompts.rationale_prompt(example, text, None), frozenset(labelled), soft)
        elif answer is not None:
            soft |= self._matching(expecting, "answer", self._prompts.answer_ids(answer))
            labelled |= {"answer"} if example.answer is not None else set()
            yield TrainingSequence(self._prompts.rationale_prompt(example, text, answer), frozenset(labelled), soft)

    def _expecting(self, example_id: str, span: Span, own: Annotation | None) -> Annotation | None:
        """The record whose soft targets belong to the words that are learned."""
        return self._soft_teacher.find(example_id, span) if self._soft_teacher else own

    def _matching(self, annotation: Annotation | None, span: Span, ids: tuple[int, ...]) -> dict[Span, SoftPlace]:
        target = annotation.targets.get(span) if annotation else None
        if (span, "soft") not in self._needed or annotation is None or target is None or target.soft is None:
            return {}
        if target.token_ids != ids:
            raise CacheError(
                f"the cache's {span} tokens are {target.token_ids[:8]}…, the student's are {ids[:8]}…: "
                "teacher and student do not write this target alike, so its soft targets cannot be used"
            )
        if target.soft.ids_E.max(initial=-1) >= self._prompts.vocabulary_size:
            raise CacheError(
                f"the cache's soft targets name token {target.soft.ids_E.max()}, the student has "
                f"{self._prompts.vocabulary_size}: the cache is damaged, or of another vocabulary; annotate anew"
            )
        return {span: SoftPlace((annotation.key, span), len(ids))}

    def _is_needed(self, sequence: TrainingSequence) -> bool:
        return any(number and place in self._needed for place, number in sequence.counts().items())


def _dealt(sequences: Sequence[TrainingSequence]) -> list[tuple[TrainingSequence, ...]]:
    """One lesson's sequences, then each further rationale as a lesson of its own."""
    reasoned = [sequence for sequence in sequences if "rationale" in sequence.prompt.spans]
    further = reasoned[1:]
    first = tuple(sequence for sequence in sequences if sequence not in further)
    return [part for part in (first, *((sequence,) for sequence in further)) if part]
