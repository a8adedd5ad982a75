"""Examples and annotations joined by key: token ids to learn, and the places of their soft targets in the cache."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, final, runtime_checkable

import numpy as np

from distill.app.machine import paused_collector
from distill.errors import CacheError
from distill.prompts.classes import ClassPrompts
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
from distill.tasks import Task

AnswerMode = Literal["direct", "reasoned"]


def first_span(mode: AnswerMode) -> Span:
    """What a student writes first after a question."""
    return "answer" if mode == "direct" else "rationale"


@runtime_checkable
class Records(Protocol):
    """A teacher's annotations, by example id and span, with targets that a student can learn."""

    @property
    def task(self) -> Task:
        """The task by whose rules answers are read."""
        ...

    def find(self, example_id: str, span: Span) -> Annotation | None:
        """Return the annotation, or None if none was requested."""
        ...

    def find_words(self, example_id: str, span: Span) -> Annotation | None:
        """Return the same; it need not have its targets."""
        ...

    def scored(self, key: str, example: Example) -> dict[Span, ScoredTokens]:
        """Return the tokens of an example's record that have soft targets, where the annotation lacks its targets."""
        ...

    def largest_soft_id(self, places: Sequence[SoftTargetsKey]) -> int:
        """Return the largest id that soft targets have an entry for; raises CacheError if some cannot be decoded."""
        ...


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
class PlacedTarget:
    """A range [start, stop) of a sequence that is learned: the gold words of an example, or else the teacher's.

    Its soft targets stay in the cache until their batch is made.
    """

    span: Span
    start: int
    stop: int
    example_id: str
    is_labelled: bool
    soft: SoftPlace | None = None

    def moved(self, by: int) -> PlacedTarget:
        """Return the target in a sequence in which its tokens stand so many positions later."""
        return replace(self, start=self.start + by, stop=self.stop + by)


@dataclass(frozen=True)
class TrainingSequence:
    """Token ids and the targets among them, in order of position.

    `branches` are the start positions of alternative continuations of the tokens before the first of them. Each
    branch attends to this shared beginning and to itself, not to other branches.
    """

    ids: tuple[int, ...]
    targets: tuple[PlacedTarget, ...]
    branches: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check that the targets follow each other; the token at position 0 has no context to be predicted from."""
        bounds = [bound for target in self.targets for bound in (target.start, target.stop)]
        if sorted(ordered := [1, *bounds, len(self.ids)]) != ordered:
            raise ValueError(f"targets at {bounds} do not follow each other in [1, {len(self.ids)})")

    @classmethod
    def of(
        cls, prompt: Prompt, example_id: str, labelled: Collection[Span], soft: Mapping[Span, SoftPlace]
    ) -> TrainingSequence:
        """A prompt as a sequence; the spans in `labelled` hold gold labels, the others the teacher's words."""
        spans = sorted(prompt.spans.items(), key=lambda item: item[1])
        targets = (PlacedTarget(n, *where, example_id, n in labelled, soft.get(n)) for n, where in spans)
        return cls(prompt.ids, tuple(targets))

    @property
    def spans(self) -> set[Span]:
        """The kinds of its targets."""
        return {target.span for target in self.targets}

    def counts(self) -> Counter[tuple[Span, str]]:
        """Return the number of supervised positions per (span, source)."""
        counts: Counter[tuple[Span, str]] = Counter()
        for target in self.targets:
            num_positions = target.stop - target.start
            counts[target.span, "labels"] += num_positions * target.is_labelled
            counts[target.span, "teacher"] += num_positions * (not target.is_labelled)
            counts[target.span, "soft"] += target.soft.num_positions if target.soft else 0
        return counts


@dataclass(frozen=True)
class Lesson:
    """The sequences of an example, or of a conversation whose turns share one; what balances and grades it.

    `answer` is the answer, of a conversation its last one, and `confidence` the teacher's in its own answers.
    """

    sequences: tuple[TrainingSequence, ...]
    answer: str | None = None
    confidence: float | None = None

    @property
    def targets(self) -> tuple[PlacedTarget, ...]:
        """The targets of all its sequences."""
        return tuple(target for sequence in self.sequences for target in sequence.targets)

    @property
    def example_ids(self) -> tuple[str, ...]:
        """The examples that it teaches."""
        return tuple(dict.fromkeys(target.example_id for target in self.targets))

    @property
    def num_tokens(self) -> int:
        """Tokens in a batch of lessons like this, including padding."""
        return len(self.sequences) * max(len(sequence.ids) for sequence in self.sequences)

    def branched(self) -> Lesson:
        """Return the lesson as one sequence: the common prefix of its sequences, and the rest of each as a branch.

        A conversation with rationales stays as it is: the mask of so many branches would need more memory.
        """
        if len(self.sequences) == 1 or len(self.example_ids) > 1:
            return self
        all_ids = [sequence.ids for sequence in self.sequences]
        # The token before a target belongs to the branch: the hidden state at p predicts token p + 1.
        limit = min(target.start for target in self.targets) - 1
        columns = zip(*(ids[:limit] for ids in all_ids), strict=True)
        shared = sum(1 for _ in itertools.takewhile(lambda tokens: len(set(tokens)) == 1, columns))
        if not shared:
            return self
        branches = [ids[shared:] for ids in all_ids]
        starts = np.cumsum([shared, *map(len, branches)])[:-1].tolist()
        targets = tuple(
            target.moved(first - shared)
            for sequence, first in zip(self.sequences, starts, strict=True)
            for target in sequence.targets
        )
        ids = (*all_ids[0][:shared], *itertools.chain.from_iterable(branches))
        return replace(self, sequences=(TrainingSequence(ids, targets, tuple(starts)),))

    def counts(self) -> Counter[tuple[Span, str]]:
        """Return the number of supervised positions per (span, source)."""
        return sum((sequence.counts() for sequence in self.sequences), Counter())


def with_shared_turns(lessons: Sequence[Lesson]) -> list[Lesson]:
    """Join the lessons of a conversation's turns where an earlier turn is, token for token, the beginning of a later.

    A causal model reads the earlier turn as it reads it alone, so losses and gradients stay the same, and the common
    tokens are read once. Where a template renders earlier turns otherwise, they are no such beginning and stay apart.
    """
    answers = [index for index, lesson in enumerate(lessons) if lesson.sequences[0].targets[-1].span == "answer"]
    answers.sort(key=lambda index: lessons[index].sequences[0].ids)
    # In lexicographic order, a sequence that begins with another one follows it at once, or others that do so.
    next_turn = {a: b for a, b in itertools.pairwise(answers) if _continues(lessons[b], lessons[a])}
    firsts = sorted({*range(len(lessons))} - {*next_turn.values()})
    return [_conversation([lessons[index] for index in _chain(first, next_turn)]) for first in firsts]


def _continues(later: Lesson, earlier: Lesson) -> bool:
    """Whether the tokens of a turn with its answer and end stand before the next turn's answer, at the beginning."""
    ids, sequence = earlier.sequences[0].ids, later.sequences[0]
    return len(ids) <= sequence.targets[0].start and sequence.ids[: len(ids)] == ids


def _chain(first: int, next_turn: Mapping[int, int]) -> Iterator[int]:
    turn: int | None = first
    while turn is not None:
        yield turn
        turn = next_turn.get(turn)


def _conversation(turns: Sequence[Lesson]) -> Lesson:
    """Put the answers of consecutive turns into the sequence of the last one; their rationales keep their own."""
    if len(turns) == 1:
        return turns[0]
    targets = tuple(target for turn in turns for target in turn.sequences[0].targets)
    whole = replace(turns[-1].sequences[0], targets=targets)
    others = (sequence for turn in turns for sequence in turn.sequences[1:])
    confidences = [turn.confidence for turn in turns if turn.confidence is not None]
    confidence = sum(confidences) / len(turns) if len(confidences) == len(turns) else None
    return Lesson((whole, *others), turns[-1].answer, confidence)


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
        learned = {id_ for lesson in self.lessons for id_ in lesson.example_ids}
        return RowCounts(self.num_examples, dict(lost.most_common()), len(learned))


@final
class Join:
    """Makes lessons from examples: gold targets where they exist, else the teacher's."""

    def __init__(
        self,
        *,
        prompts: Prompts | ClassPrompts,
        teacher: Records,
        soft_teacher: Records | None,
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
            lessons += [Lesson(part, answer, confidence) for part in parts]
        if any(example.history for example in examples):
            lessons = with_shared_turns(lessons)
        self._check_soft_ids(lessons)
        return Joined(len(examples), lessons, lost, too_long, num_too_long)

    def _check_soft_ids(self, lessons: Sequence[Lesson]) -> None:
        """Raise CacheError unless all soft targets can be decoded and the student has all their tokens."""
        places = [target.soft.place for lesson in lessons for target in lesson.targets if target.soft]
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
        if isinstance(self._prompts, Prompts):
            yield from self._reasoning(self._prompts, example)

    def _answer_alone(self, example: Example, annotation: Annotation | None) -> Iterator[TrainingSequence]:
        answer = _answer_of(example, annotation)
        if answer is not None:
            yield self._answered(example, answer, self._scored(example, "answer", annotation))

    def _answered(self, example: Example, answer: str, scored: Scored | None) -> TrainingSequence:
        soft = self._soft_places(scored, "answer", self._prompts.answer_ids(answer))
        labelled: set[Span] = {"answer"} if example.answer is not None else set()
        return TrainingSequence.of(self._prompts.answer_prompt(example, answer), example.id, labelled, soft)

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

    def _reasoning(self, prompts: Prompts, example: Example) -> Iterator[TrainingSequence]:
        if example.rationale is not None:
            scored = self._scored(example, "rationale", None)
            yield from self._reason(prompts, example, example.rationale, None, scored)
            return
        for index, rationale in enumerate(self._rationales.get(example.id, ())):
            annotation, text = rationale.annotation, rationale.annotation.rationale
            if text is not None:
                scored = self._scored(example, "rationale", annotation)
                # A second teacher scores only the first of an example's rationales.
                yield from self._reason(
                    prompts, example, text, annotation.answer, None if index and self._soft_teacher else scored
                )

    def _reason(
        self, prompts: Prompts, example: Example, text: str, conclusion: str | None, scored: Scored | None
    ) -> Iterator[TrainingSequence]:
        answer = self._right_conclusion(example, conclusion)
        soft = self._soft_places(scored, "rationale", prompts.rationale_ids(text))
        labelled: set[Span] = {"rationale"}
        if self._answer == "direct":
            yield TrainingSequence.of(prompts.rationale_prompt(example, text, None), example.id, labelled, soft)
        elif answer is not None:
            if conclusion in (None, answer):  # the teacher's words for a gold answer may be others
                soft |= self._soft_places(scored, "answer", prompts.answer_ids(answer))
            labelled |= {"answer"} if example.answer is not None else set()
            yield TrainingSequence.of(prompts.rationale_prompt(example, text, answer), example.id, labelled, soft)

    def _right_conclusion(self, example: Example, conclusion: str | None) -> str | None:
        """The right answer that a rationale leads to, in the words of the labels; the conclusion if unlabelled."""
        is_same = self._teacher.task.is_same
        same = (answer for answer in example.right_answers if conclusion and is_same(conclusion, answer))
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
    reasoned = [sequence for sequence in sequences if "rationale" in sequence.spans]
    further = reasoned[1:]
    first = tuple(sequence for sequence in sequences if sequence not in further)
    return [part for part in (first, *((sequence,) for sequence in further)) if part]
