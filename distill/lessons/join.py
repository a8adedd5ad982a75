"""Examples and annotations joined by key: token ids to learn, and the places of their soft targets in the cache."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, final

import numpy as np

from distill.annotation.reader import AnnotationReader
from distill.app.machine import paused_collector
from distill.errors import CacheError
from distill.prompts.rendering import Prompts
from distill.prompts.vocabularies import Pairing
from distill.records import (
    Annotation,
    Example,
    FilteredRationale,
    Prompt,
    RowCounts,
    ScoredTokens,
    SoftTargets,
    SoftTargetsKey,
    Span,
)

AnswerMode = Literal["direct", "reasoned"]


def first_span(mode: AnswerMode) -> Span:
    """What a student writes first after a question."""
    return "answer" if mode == "direct" else "rationale"


Needed = frozenset[tuple[Span, str]]
Scored = tuple[str, Mapping[Span, ScoredTokens]]  # the key of a record, and its tokens that have soft targets
Read = Callable[[Sequence[SoftTargetsKey]], SoftTargets]


@dataclass(frozen=True)
class SoftPlace:
    """The place of a span's soft targets in the cache.

    They are for the tokens of the span at the offsets `chosen`; None: for the first `num_positions` ones.
    """

    place: SoftTargetsKey
    num_positions: int
    chosen: tuple[int, ...] | None = None


@dataclass(frozen=True)
class TrainingSequence:
    """One prompt with its targets; spans in `labelled` hold gold labels, the others the teacher's words.

    Soft targets stay in the cache until their batch is made.
    """

    prompt: Prompt
    labelled: frozenset[Span]
    soft: Mapping[Span, SoftPlace]

    def counts(self) -> Counter[tuple[Span, str]]:
        """Return the number of supervised positions per (span, source)."""
        counts: Counter[tuple[Span, str]] = Counter()
        for span, (start, stop) in self.prompt.spans.items():
            counts[span, "labels"] = (stop - start) * (span in self.labelled)
            counts[span, "teacher"] = (stop - start) * (span not in self.labelled)
            counts[span, "soft"] = self.soft[span].num_positions if span in self.soft else 0
        return counts


@dataclass(frozen=True)
class Lesson:
    """The sequences of one example, its answer, and the teacher's confidence in its own answer."""

    example_id: str
    sequences: tuple[TrainingSequence, ...]
    answer: str | None = None
    confidence: float | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens in a batch of lessons like this, including padding."""
        return len(self.sequences) * max(len(sequence.prompt.ids) for sequence in self.sequences)

    def branched(self) -> Lesson:
        """Return the lesson as one sequence: the common prefix of its sequences, and the rest of each as a branch."""
        if len(self.sequences) == 1:
            return self
        prompts = [sequence.prompt for sequence in self.sequences]
        # The token before a target belongs to the branch: the hidden state at p predicts token p + 1.
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
        """Return the number of supervised positions per (span, source)."""
        return sum((sequence.counts() for sequence in self.sequences), Counter())


@dataclass(frozen=True)
class Joined:
    """The lessons that the losses can learn from `num_examples` examples.

    `lost` has the reason of every example without a lesson, `too_long` the details of those that are too long.
    `num_answers_too_long` counts the further answers of examples with a lesson that are too long for one.
    """

    num_examples: int
    lessons: Sequence[Lesson]
    lost: Mapping[str, str]
    too_long: Mapping[str, str]
    num_answers_too_long: int = 0

    @property
    def counts(self) -> RowCounts:
        """Count the examples that have become lessons, and the others by their reason."""
        lost = Counter(self.lost.values())
        return RowCounts(self.num_examples, dict(lost.most_common()), len({le.example_id for le in self.lessons}))


@final
class Join:
    """Makes lessons from examples: gold targets where they exist, else the teacher's."""

    def __init__(
        self,
        *,
        prompts: Prompts,
        teacher: AnnotationReader,
        soft_teacher: AnnotationReader | None,
        rationales: Mapping[str, Sequence[FilteredRationale]],
        further_answers: Mapping[str, Sequence[Annotation]],
        answer: AnswerMode,
        needed: Needed,
        pairing: Pairing,
        too_long: Mapping[str, str],
    ) -> None:
        """`rationales` are the kept ones, by example id, and `further_answers` the teacher's answers after the first.

        `needed` lists the (span, source) that the losses read.

        `too_long` has the examples, by id, that are too long for a teacher. With a `soft_teacher`, which scored the
        same texts, all soft targets are its own; else they are the teacher's. `pairing` is that of its vocabulary and
        the student's.
        """
        self._pairing = pairing
        self._prompts, self._teacher, self._soft_teacher = prompts, teacher, soft_teacher
        self._rationales, self._answer, self._needed = rationales, answer, needed
        self._too_long, self._further_answers = too_long, further_answers

    @paused_collector()
    def join(self, examples: Sequence[Example]) -> Joined:
        """Return the lessons of the examples, and why others have none."""
        lessons, lost, too_long, num_too_long = list[Lesson](), dict[str, str](), dict[str, str](), 0
        for example in examples:
            annotation = self._teacher.find_words(example.id, "answer")
            try:
                sequences = [s for s in self._sequences(example, annotation) if self._is_needed(s)]
            except ValueError as error:
                too_long[example.id], lost[example.id] = str(error), "too long"
                continue
            if not sequences:
                lost[example.id] = self._reason_to_lose(example, annotation)
            confidence, answer = self._confidence(example, annotation), _answer_of(example, annotation)
            further = self._further(example) if sequences else []
            num_too_long += further.count(None)
            parts = [*_split_rationales(sequences), *((s,) for s in further if s and self._is_needed(s))]
            lessons += [Lesson(example.id, part, answer, confidence) for part in parts]
        self._check_soft_ids(lessons)
        return Joined(len(examples), lessons, lost, too_long, num_too_long)

    def _check_soft_ids(self, lessons: Sequence[Lesson]) -> None:
        """Raise CacheError unless all soft targets can be decoded and the student has all their tokens."""
        sequences = (sequence for lesson in lessons for sequence in lesson.sequences)
        places = [soft.place for sequence in sequences for soft in sequence.soft.values()]
        largest = (self._soft_teacher or self._teacher).largest_soft_id(places)
        if self._pairing.id_V is None and largest >= self._prompts.vocabulary_size:
            raise CacheError(
                f"the cache has soft targets for token id {largest}, the student has "
                f"{self._prompts.vocabulary_size} tokens: the cache is damaged or of another vocabulary; annotate again"
            )

    def _reason_to_lose(self, example: Example, annotation: Annotation | None) -> str:
        """Return why no loss can learn from an example."""
        if example.id in self._too_long:
            return "too long"
        sources = {source for _, source in self._needed}
        if self._answer == "reasoned" or {span for span, _ in self._needed} == {"rationale"}:
            return "no rationale"
        if example.answer is not None:
            return "no soft targets" if "soft" in sources else "no loss on its label"
        if sources == {"labels"}:
            return "no label"
        return (annotation.defect if annotation else "not annotated") or "no soft targets"

    def _confidence(self, example: Example, annotation: Annotation | None) -> float | None:
        """Return the probability of the teacher's choice, or the share of its samples that agree."""
        if annotation and annotation.choice_logprobs:
            return annotation.confidence
        rationales = self._rationales.get(example.id)
        return rationales[0].confidence if rationales else None

    def _sequences(self, example: Example, annotation: Annotation | None) -> Iterator[TrainingSequence]:
        if self._answer == "direct":
            yield from self._answer_alone(example, annotation)
        yield from self._reasoning(example)

    def _answer_alone(self, example: Example, annotation: Annotation | None) -> Iterator[TrainingSequence]:
        answer = _answer_of(example, annotation)
        if answer is not None:
            yield self._answered(example, answer, self._scored(example, "answer", annotation))

    def _answered(self, example: Example, answer: str, scored: Scored | None) -> TrainingSequence:
        soft = self._soft_places(scored, "answer", self._prompts.answer_ids(answer))
        labelled: frozenset[Span] = frozenset({"answer"} if example.answer is not None else ())
        return TrainingSequence(self._prompts.answer_prompt(example, answer), labelled, soft)

    def _further(self, example: Example) -> list[TrainingSequence | None]:
        """The further answers of an example, None for each that is too long."""
        sequences = list[TrainingSequence | None]()
        for annotation in self._further_answers.get(example.id, ()) if self._answer == "direct" else ():
            # A second teacher scores only the first of an example's answers.
            scored = None if self._soft_teacher else self._scored(example, "answer", annotation)
            try:
                sequences.append(self._answered(example, str(annotation.answer), scored))
            except ValueError:
                sequences.append(None)
        return sequences

    def _reasoning(self, example: Example) -> Iterator[TrainingSequence]:
        if example.rationale is not None:
            yield from self._reason(example, example.rationale, None, self._scored(example, "rationale", None))
            return
        for index, rationale in enumerate(self._rationales.get(example.id, ())):
            annotation, text = rationale.annotation, rationale.annotation.rationale
            if text is not None:
                scored = self._scored(example, "rationale", annotation)
                # A second teacher scores only the first of an example's rationales.
                yield from self._reason(
                    example, text, annotation.answer, None if index and self._soft_teacher else scored
                )

    def _reason(
        self, example: Example, text: str, conclusion: str | None, scored: Scored | None
    ) -> Iterator[TrainingSequence]:
        answer = self._right_conclusion(example, conclusion)
        soft = self._soft_places(scored, "rationale", self._prompts.rationale_ids(text))
        labelled: set[Span] = {"rationale"}
        if self._answer == "direct":
            yield TrainingSequence(self._prompts.rationale_prompt(example, text, None), frozenset(labelled), soft)
        elif answer is not None:
            if conclusion in (None, answer):  # the teacher's words for a gold answer may be others
                soft |= self._soft_places(scored, "answer", self._prompts.answer_ids(answer))
            labelled |= {"answer"} if example.answer is not None else set()
            yield TrainingSequence(self._prompts.rationale_prompt(example, text, answer), frozenset(labelled), soft)

    def _right_conclusion(self, example: Example, conclusion: str | None) -> str | None:
        """The right answer that a rationale leads to, in the words of the labels; the conclusion if unlabelled."""
        value = self._teacher.task.value
        same = (answer for answer in example.right_answers if conclusion and value(answer) == value(conclusion))
        return next(same, example.answer or conclusion)

    def _scored(self, example: Example, span: Span, own: Annotation | None) -> Scored | None:
        """Return the tokens with soft targets that belong to the learned text, None if no loss reads any."""
        if all(source != "soft" for _, source in self._needed):
            return None
        annotation = self._soft_teacher.find_words(example.id, span) if self._soft_teacher else own
        if annotation is None:
            return None
        known = {name: target.scored for name, target in annotation.targets.items() if target.soft is not None}
        return annotation.key, known or (self._soft_teacher or self._teacher).scored(annotation.key, example)

    def _soft_places(self, scored: Scored | None, span: Span, ids: tuple[int, ...]) -> dict[Span, SoftPlace]:
        key, by_span = scored or ("", {})
        if (span, "soft") not in self._needed or span not in by_span:
            return {}
        paired_ids = self._pairing.ids(by_span[span].token_ids)
        if paired_ids != ids and (-1 in paired_ids or not self._pairing.has(ids)):
            return {}  # one of the two has a token for a part of this text that the other lacks
        if paired_ids != ids:
            raise CacheError(
                f"the {span} is {paired_ids[:8]}… in the cache and {ids[:8]}… for the student: teacher and "
                "student tokenize this target differently, so its soft targets cannot be used"
            )
        return {span: SoftPlace((key, span), by_span[span].num_positions, by_span[span].chosen)}

    def _is_needed(self, sequence: TrainingSequence) -> bool:
        return any(count and key in self._needed for key, count in sequence.counts().items())


def _answer_of(example: Example, annotation: Annotation | None) -> str | None:
    """The gold answer, else the whole answer of the teacher."""
    return example.answer or (annotation.whole_answer if annotation else None)


def _split_rationales(sequences: Sequence[TrainingSequence]) -> list[tuple[TrainingSequence, ...]]:
    """Return the sequences of the first lesson, then one lesson for each further rationale."""
    reasoned = [sequence for sequence in sequences if "rationale" in sequence.prompt.spans]
    further = reasoned[1:]
    first = tuple(sequence for sequence in sequences if sequence not in further)
    return [part for part in (first, *((sequence,) for sequence in further)) if part]
