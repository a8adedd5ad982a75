"""Examples and annotations joined by key, sampled in an order that is a function of the seed, collated.

A step's examples, and with them the number of positions that each loss will see in the whole step, are known
before it begins; so a loss is divided by its true count whatever the number of microbatches and processes.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, final

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from distill.cache.store import Store
from distill.prompts import Prompts
from distill.records import (
    SPANS,
    Annotation,
    Batch,
    CacheError,
    CheckedRationale,
    ConfigError,
    Entries,
    Example,
    Place,
    Prompt,
    Request,
    SoftTargets,
    Span,
)

AnswerMode = Literal["direct", "reasoned"]
BatchUnit = Literal["examples", "tokens"]
Needed = frozenset[tuple[Span, str]]
Read = Callable[[Sequence[Place]], SoftTargets]
_WINDOW_STEPS = 20


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
                sequences = [s for s in self._sequences(example) if self._is_needed(s)]
            except ValueError as error:
                self.skipped[example.id] = str(error)
                continue
            annotation = self._teacher.find(example.id, "answer")
            answer = example.answer or (annotation.answer if annotation else None)
            confidence = self._confidence(example, annotation)
            found += [Lesson(example.id, part, answer, confidence) for part in _dealt(sequences)]
        return found

    def _confidence(self, example: Example, annotation: Annotation | None) -> float | None:
        """The probability of the teacher's choice, or the share of its samples that agree."""
        if annotation and annotation.choice_logprobs:
            scores = np.exp(annotation.choice_logprobs)
            return float(scores.max() / scores.sum())
        rationales = self._rationales.get(example.id)
        return rationales[0].confidence if rationales else None

    def _sequences(self, example: Example) -> Iterator[TrainingSequence]:
        if self._answer == "direct":
            yield from self._answer_alone(example)
        yield from self._reasoning(example)

    def _answer_alone(self, example: Example) -> Iterator[TrainingSequence]:
        annotation = self._teacher.find(example.id, "answer")
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


@dataclass(frozen=True)
class Arrangement:
    """Which lessons come first, and which come more often.

    The first epoch can go from easy to hard (Bengio et al. 2009, "Curriculum Learning"): short lessons first, or those
    whose answer the teacher is sure of. Balanced, an epoch goes through rarer answers, or rarer degrees of the
    teacher's confidence (fifths), again until each is as frequent as the most frequent.
    """

    order: Literal["shuffled", "short_first", "confident_first"] = "shuffled"
    balance: Literal["none", "answer", "confidence"] = "none"

    def check(self, lessons: Sequence[Lesson]) -> None:
        """Raise ConfigError where the lessons lack what they would be arranged by."""
        is_asked = self.order == "confident_first" or self.balance == "confidence"
        lacking = sum(lesson.confidence is None for lesson in lessons) if is_asked else 0
        if lacking:
            raise ConfigError(
                f"{lacking} of {len(lessons)} lessons have no confidence of the teacher's: it has answers to choose "
                "from in no other task, and votes only where teacher.rationales_each is above 1. Set "
                "order=shuffled or order=short_first, and balance=none or balance=answer"
            )

    def epoch(self, lessons: Sequence[Lesson]) -> list[int]:
        """Indices of the lessons of one epoch, in no order that means anything."""
        strata: dict[object, list[int]] = {}
        for index, lesson in enumerate(lessons):
            strata.setdefault(self._stratum(lesson), []).append(index)
        most = max(map(len, strata.values()), default=0)
        return sorted(
            index for members in strata.values() for index in itertools.islice(itertools.cycle(members), most)
        )

    def difficulty(self, lesson: Lesson) -> float:
        """What the first epoch is sorted by."""
        return float(lesson.num_tokens) if self.order == "short_first" else -(lesson.confidence or 0.0)

    def _stratum(self, lesson: Lesson) -> object:
        if self.balance == "none":
            return None
        return lesson.answer if self.balance == "answer" else min(4, int(5 * (lesson.confidence or 0.0)))


@dataclass(frozen=True)
class Microbatch:
    """Indices of the examples that pass through the model together, and the counts of their whole step."""

    indices: tuple[int, ...]
    counts: Mapping[tuple[Span, str], int]


@final
class StepSampler(Sampler[Microbatch]):
    """Endless epochs of the lessons, each in a new order that (seed, epoch) alone decides, cut into steps.

    A step is cut into `world_size * num_microbatches` parts of nearly equal size, dealt to the processes in
    turn. The position in the stream is the number of steps done, so any step can be resumed from.
    """

    def __init__(
        self,
        lessons: Sequence[Lesson],
        *,
        batch_size: int,
        batch_unit: BatchUnit,
        num_microbatches: int,
        num_steps: int,
        seed: int,
        arrangement: Arrangement = Arrangement(),
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
    ) -> None:
        """`batch_size` is of one optimizer step over all microbatches and processes.

        It counts examples, or tokens with their padding: then as many lessons of like length as it holds make a
        step, but at least one for each microbatch.
        """
        self._num_parts = world_size * num_microbatches
        if batch_size < self._num_parts:
            raise ConfigError(
                f"batch_size={batch_size} leaves some of {world_size} processes x {num_microbatches} microbatches "
                f"without an example; make it at least {self._num_parts}, or microbatch_size larger"
            )
        self._lessons, self._batch_size, self._num_microbatches = lessons, batch_size, num_microbatches
        self._num_tokens = [lesson.num_tokens for lesson in lessons]
        self._sizes = self._num_tokens if batch_unit == "tokens" else [1] * len(lessons)
        self._num_steps, self._seed, self._start_step = num_steps, seed, start_step
        self._rank, self._world_size = rank, world_size
        self._epoch, self._arrangement = arrangement.epoch(lessons), arrangement

    def __len__(self) -> int:
        """Number of this process's microbatches in the whole run."""
        return self._num_steps * self._num_microbatches

    def __iter__(self) -> Iterator[Microbatch]:
        """Yield this process's microbatches from the first step that is to be done."""
        for indices in itertools.islice(self.steps(), self._start_step, self._num_steps):
            counts = sum((self._lessons[index].counts() for index in indices), Counter[tuple[Span, str]]())
            parts = np.array_split(np.array(indices), self._num_parts)
            for part in parts[self._rank :: self._world_size]:
                yield Microbatch(tuple(part.tolist()), counts)

    def steps(self) -> Iterator[list[int]]:
        """Lessons of one optimizer step after the other, without an end."""
        last: list[int] = []
        for epoch in itertools.count():
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            order = [self._epoch[place] for place in torch.randperm(len(self._epoch), generator=generator).tolist()]
            is_graded = not epoch and self._arrangement.order != "shuffled"
            if is_graded:
                order.sort(key=lambda index: self._arrangement.difficulty(self._lessons[index]))
            # What the last epoch left over is filled up first, so that no other step is of unlike lengths.
            while last and order and self._fits(len(last) + 1, max(self._sizes[i] for i in (*last, order[-1]))):
                last.append(order.pop())
            if last and order:
                yield last
                last = []
            if not order:
                continue
            steps = list(self._cut(order))
            if self._fits(len(steps[-1]) + 1, self._sizes[steps[-1][-1]]):
                last = steps.pop()
            places = range(len(steps)) if is_graded else torch.randperm(len(steps), generator=generator).tolist()
            yield from (steps[place] for place in places)

    def _cut(self, order: Sequence[int]) -> Iterator[list[int]]:
        """Lessons of like length share a step, so there is little padding: windows of many steps are sorted."""
        before = np.cumsum([0, *(self._sizes[index] for index in order[:-1])])
        window = before // (self._batch_size * _WINDOW_STEPS)
        step: list[int] = []
        for start, stop in itertools.pairwise([*np.flatnonzero(np.diff(window, prepend=-1)), len(order)]):
            # Where the last of a window's steps is not full, its lessons go on into the next window.
            if step and not self._fits(len(step) + 1, self._sizes[step[-1]]):
                yield step
                step = []
            near, step = sorted([*step, *order[start:stop]], key=self._num_tokens.__getitem__), []
            for index in near:
                if step and not self._fits(len(step) + 1, self._sizes[index]):
                    yield step
                    step = []
                step.append(index)
        yield step

    def _fits(self, number: int, largest: int) -> bool:
        return number <= self._num_parts or number * largest <= self._batch_size


@final
class _Lessons(Dataset[Batch]):
    def __init__(self, lessons: Sequence[Lesson], read: Read, padding_id: int) -> None:
        self._lessons, self._read, self._padding_id = lessons, read, padding_id

    def __getitem__(self, microbatch: Microbatch) -> Batch:
        lessons = [self._lessons[i] for i in microbatch.indices]
        return collate(lessons, microbatch.counts, self._padding_id, self._read)


@final
class DistillData(lightning.LightningDataModule):
    """Feeds one student's training: steps of lessons, and the validation lessons in order."""

    def __init__(
        self,
        *,
        train: Sequence[Lesson],
        validation: Sequence[Lesson],
        read: Read,
        batch_size: int,
        microbatch_size: int,
        batch_unit: BatchUnit,
        arrangement: Arrangement,
        num_steps: int,
        seed: int,
        padding_id: int,
    ) -> None:
        """`batch_size` counts examples or tokens per optimizer step, `microbatch_size` per forward pass.

        `read` gives the soft targets of places in the cache, one after the other.
        """
        super().__init__()
        self._train, self._validation, self._read = train, validation, read
        self._batch_size, self._microbatch_size, self._batch_unit = batch_size, microbatch_size, batch_unit
        self._num_steps, self._seed, self._padding_id = num_steps, seed, padding_id
        self._arrangement = arrangement
        arrangement.check(train)

    def num_microbatches(self, world_size: int) -> int:
        """Microbatches per process and optimizer step."""
        return max(1, -(-self._batch_size // (self._microbatch_size * world_size)))

    def train_dataloader(self) -> DataLoader[Batch]:
        trainer = self.trainer
        assert trainer is not None
        sampler = StepSampler(
            self._train,
            batch_size=self._batch_size,
            batch_unit=self._batch_unit,
            arrangement=self._arrangement,
            num_microbatches=self.num_microbatches(trainer.world_size),
            num_steps=self._num_steps,
            seed=self._seed,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            start_step=trainer.global_step,
        )
        return self._loader(self._train, sampler)

    def val_dataloader(self) -> DataLoader[Batch]:
        order = np.argsort([lesson.num_tokens for lesson in self._validation], kind="stable")
        indices = np.array_split(order, max(1, len(order) // 32))
        batches = [Microbatch(tuple(part.tolist()), {}) for part in indices]
        return self._loader(self._validation, batches)

    def _loader(self, lessons: Sequence[Lesson], batches: Sequence[Microbatch] | StepSampler) -> DataLoader[Batch]:
        # A batch is made whole by the dataset, so there is nothing left to collate.
        return DataLoader(_Lessons(lessons, self._read, self._padding_id), sampler=batches, batch_size=None)


def collate(lessons: Sequence[Lesson], counts: Mapping[tuple[Span, str], int], padding_id: int, read: Read) -> Batch:
    """Pad on the right and list the supervised positions, in order of sequence and place; read their soft targets."""
    sequences = [sequence for lesson in lessons for sequence in lesson.sequences]
    length_B = np.array([len(sequence.prompt.ids) for sequence in sequences])
    mask_BT = np.arange(length_B.max()) < length_B[:, None]
    ids_BT = np.full(mask_BT.shape, padding_id)
    ids_BT[mask_BT] = np.concatenate([sequence.prompt.ids for sequence in sequences])
    branch_BT, position_BT = np.zeros_like(ids_BT), np.where(mask_BT, np.arange(mask_BT.shape[1]), 0)
    for row, prompt in enumerate(sequence.prompt for sequence in sequences):
        for branch, start in enumerate(prompt.branches, 1):
            branch_BT[row, start:] = branch
            position_BT[row, start : len(prompt.ids)] = prompt.branches[0] + np.arange(len(prompt.ids) - start)
    spans = [
        (row, span, where, sequence.soft.get(span), span in sequence.labelled)
        for row, sequence in enumerate(sequences)
        for span, where in sorted(sequence.prompt.spans.items(), key=lambda item: item[1])
    ]
    sequence_S, start_S, stop_S = np.array([(row, *where) for row, _, where, _, _ in spans]).T
    which_S, num_soft_S, is_labelled_S = np.array(
        [(SPANS.index(span), soft.num_positions if soft else 0, known) for _, span, _, soft, known in spans]
    ).T
    span_N = np.repeat(np.arange(len(spans)), stop_S - start_S)
    first_S = np.cumsum(stop_S - start_S) - (stop_S - start_S)
    place_N = np.arange(len(span_N)) - first_S[span_N]
    at_N, sequence_N = start_S[span_N] + place_N, sequence_S[span_N]
    places = [soft.place for *_, soft, _ in spans if soft]
    is_soft_N = place_N < num_soft_S[span_N]
    return Batch(
        input_ids_BT=torch.from_numpy(ids_BT),
        mask_BT=torch.from_numpy(mask_BT.astype(np.int64)),
        position_BT=torch.from_numpy(position_BT),
        branch_BT=torch.from_numpy(branch_BT) if branch_BT.any() else None,
        sequence_N=torch.from_numpy(sequence_N),
        before_N=torch.from_numpy(at_N - 1),
        label_N=torch.from_numpy(ids_BT[sequence_N, at_N]),
        is_labelled_N=torch.from_numpy(is_labelled_S[span_N] > 0),
        span_N=torch.from_numpy(which_S[span_N]),
        is_soft_N=torch.from_numpy(is_soft_N),
        soft=entries(is_soft_N, read(places).for_training()) if places else None,
        counts=counts,
        example_ids=tuple(lesson.example_id for lesson in lessons),
    )


def entries(is_soft_N: np.ndarray, soft: SoftTargets) -> Entries:
    """What a loss reads of the soft targets of those of N positions that have them."""
    position_M = np.flatnonzero(is_soft_N)
    if len(position_M) != len(soft):
        raise CacheError(f"{len(position_M)} positions have the soft targets of {len(soft)}: the cache is damaged")
    num_N, tail_N = np.zeros(len(is_soft_N), np.int64), np.zeros(len(is_soft_N), np.float32)
    num_N[position_M], tail_N[position_M] = soft.num_N, soft.tail_N
    return Entries(
        np.cumsum(num_N),
        torch.from_numpy(np.repeat(position_M.astype(np.int32), soft.num_N)),
        torch.from_numpy(soft.ids_E),
        torch.from_numpy(soft.logprobs_E),
        torch.from_numpy(tail_N) if soft.num_drawn_N is None else None,
    )
