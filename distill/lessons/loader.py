"""Lessons in an order that is a function of the seed, cut into steps and loaded as batches.

The examples of a step, and so the number of positions that each loss sees in it, are known before the step begins.
Each loss is therefore divided by its exact count for any number of microbatches and processes.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from distill.errors import ConfigError
from distill.lessons.collate import collate
from distill.lessons.join import Lesson, Read
from distill.models.batches import BatchLimit, BatchUnit
from distill.records import Batch, Span

Order = Literal["shuffled", "short_first", "confident_first"]
Balance = Literal["none", "answer", "confidence"]
_WINDOW_STEPS = 20


@dataclass(frozen=True)
class Arrangement:
    """Which lessons come first, and which are repeated.

    The first epoch can go from easy to hard (Bengio et al. 2009, "Curriculum Learning"): short lessons first, or
    lessons on whose answer the teacher is confident. With `balance`, an epoch repeats the lessons of rarer answers, or
    of rarer fifths of the teacher's confidence, until all are equally frequent.
    """

    order: Order = "shuffled"
    balance: Balance = "none"

    def check(self, lessons: Sequence[Lesson]) -> None:
        """Raise ConfigError if lessons lack the confidence that they are to be arranged by."""
        needs_confidence = self.order == "confident_first" or self.balance == "confidence"
        num_missing = sum(lesson.confidence is None for lesson in lessons) if needs_confidence else 0
        if num_missing:
            raise ConfigError(
                f"{num_missing} of {len(lessons)} lessons lack the teacher's confidence, which exists for tasks with "
                "choices and, by votes, for teacher.rationales_each > 1. Set order=shuffled or order=short_first, and "
                "balance=none or balance=answer"
            )

    def epoch(self, lessons: Sequence[Lesson]) -> list[int]:
        """Return the indices of the lessons of one epoch, unordered."""
        strata: dict[object, list[int]] = {}
        for index, lesson in enumerate(lessons):
            strata.setdefault(self._stratum(lesson), []).append(index)
        max_size = max(map(len, strata.values()), default=0)
        return sorted(
            index for members in strata.values() for index in itertools.islice(itertools.cycle(members), max_size)
        )

    def difficulty(self, lesson: Lesson) -> float:
        """Return the key that the first epoch is sorted by."""
        return float(lesson.num_tokens) if self.order == "short_first" else -(lesson.confidence or 0.0)

    def _stratum(self, lesson: Lesson) -> object:
        if self.balance == "none":
            return None
        return lesson.answer if self.balance == "answer" else min(4, int(5 * (lesson.confidence or 0.0)))


def microbatches_per_step(batch_size: int, microbatch_size: int, world_size: int) -> int:
    """Return the number of microbatches per process and optimizer step."""
    return max(1, -(-batch_size // (microbatch_size * world_size)))


def check_batch_size(batch_size: int, num_microbatches: int, world_size: int) -> None:
    """Raise ConfigError if a step is too small to give every process all its microbatches."""
    if batch_size < world_size * num_microbatches:
        raise ConfigError(
            f"batch_size={batch_size} is too small for {world_size} processes x {num_microbatches} microbatches; "
            f"set it to at least {world_size * num_microbatches}, or increase microbatch_size"
        )


@dataclass(frozen=True)
class Microbatch:
    """Indices of the lessons of one forward pass, and the counts of their whole step."""

    indices: tuple[int, ...]
    counts: Mapping[tuple[Span, str], int]


@final
class StepSampler(Sampler[Microbatch]):
    """Endless epochs of the lessons, each in an order that depends on (seed, epoch), cut into steps.

    A step is cut into `world_size * num_microbatches` chunks of nearly equal size, assigned to the processes in turn.
    The position in the stream is the number of completed steps, so training can resume at any step.
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
        """`batch_size` is the size of one optimizer step over all microbatches and processes.

        It counts examples, or tokens including padding. With tokens, a step holds as many lessons of similar length
        as fit, and at least one for each microbatch.
        """
        check_batch_size(batch_size, num_microbatches, world_size)
        self._num_chunks = world_size * num_microbatches
        self._lessons, self._batch_size, self._num_microbatches = lessons, batch_size, num_microbatches
        self._num_tokens = [lesson.num_tokens for lesson in lessons]
        self._sizes = self._num_tokens if batch_unit == "tokens" else [1] * len(lessons)
        self._num_steps, self._seed, self._start_step = num_steps, seed, start_step
        self._rank, self._world_size = rank, world_size
        self._epoch, self._arrangement = arrangement.epoch(lessons), arrangement

    def __len__(self) -> int:
        """Return the number of this process's microbatches in the whole run."""
        return self._num_steps * self._num_microbatches

    def __iter__(self) -> Iterator[Microbatch]:
        """Yield this process's microbatches, beginning at the first step that is not done."""
        for indices in itertools.islice(self.steps(), self._start_step, self._num_steps):
            counts = sum((self._lessons[index].counts() for index in indices), Counter[tuple[Span, str]]())
            chunks = np.array_split(np.array(indices), self._num_chunks)
            for chunk in chunks[self._rank :: self._world_size]:
                yield Microbatch(tuple(chunk.tolist()), counts)

    def steps(self) -> Iterator[list[int]]:
        """Yield the lesson indices of each optimizer step, without end."""
        last: list[int] = []
        for epoch in itertools.count():
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            order = [self._epoch[place] for place in torch.randperm(len(self._epoch), generator=generator).tolist()]
            is_graded = not epoch and self._arrangement.order != "shuffled"
            if is_graded:
                order.sort(key=lambda index: self._arrangement.difficulty(self._lessons[index]))
            # Fill the incomplete step of the last epoch first, so that no other step mixes lengths.
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
        """Put lessons of similar length into one step to reduce padding: sort windows of many steps by length."""
        before = np.cumsum([0, *(self._sizes[index] for index in order[:-1])])
        window = before // (self._batch_size * _WINDOW_STEPS)
        step: list[int] = []
        for start, stop in itertools.pairwise([*np.flatnonzero(np.diff(window, prepend=-1)), len(order)]):
            # The lessons of a window's incomplete last step move on into the next window.
            if step and not self._fits(len(step) + 1, self._sizes[step[-1]]):
                yield step
                step = []
            by_length, step = sorted([*step, *order[start:stop]], key=self._num_tokens.__getitem__), []
            for index in by_length:
                if step and not self._fits(len(step) + 1, self._sizes[index]):
                    yield step
                    step = []
                step.append(index)
        yield step

    def _fits(self, number: int, largest: int) -> bool:
        return number <= self._num_chunks or number * largest <= self._batch_size


@final
class _Lessons(Dataset[Batch]):
    def __init__(self, lessons: Sequence[Lesson], read: Read, padding_id: int) -> None:
        self._lessons, self._read, self._padding_id = lessons, read, padding_id

    def __getitem__(self, microbatch: Microbatch) -> Batch:
        lessons = [self._lessons[i] for i in microbatch.indices]
        return collate(lessons, microbatch.counts, self._padding_id, self._read)


@final
class DistillData(lightning.LightningDataModule):
    """The data of one student's training: steps of lessons, and the validation lessons by length."""

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
        num_workers: int,
    ) -> None:
        """`batch_size` counts examples or tokens per optimizer step, `microbatch_size` per forward pass.

        `read` returns the soft targets of places in the cache, concatenated.
        """
        super().__init__()
        self._train, self._validation, self._read = train, validation, read
        self._batch_size, self._microbatch_size, self._batch_unit = batch_size, microbatch_size, batch_unit
        self._num_steps, self._seed, self._padding_id = num_steps, seed, padding_id
        self._arrangement, self._num_workers = arrangement, num_workers
        arrangement.check(train)

    def num_microbatches(self, world_size: int) -> int:
        """Return the number of microbatches per process and optimizer step."""
        return microbatches_per_step(self._batch_size, self._microbatch_size, world_size)

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
        lengths = [lesson.num_tokens for lesson in self._validation]
        batches = BatchLimit(self._microbatch_size, self._batch_unit).batches(lengths)
        return self._loader(self._validation, [Microbatch(tuple(batch), {}) for batch in batches])

    def _loader(self, lessons: Sequence[Lesson], batches: Sequence[Microbatch] | StepSampler) -> DataLoader[Batch]:
        # The dataset returns whole batches, so the loader has nothing to collate.
        dataset = _Lessons(lessons, self._read, self._padding_id)
        return DataLoader(dataset, sampler=batches, batch_size=None, num_workers=self._num_workers)
