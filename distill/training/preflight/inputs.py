"""The input of preflight, the findings of its checks, and the few lessons that it samples."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distill.lessons.collate import collate
from distill.lessons.join import Lesson, PlacedTarget, Read, TrainingSequence
from distill.losses import Objective
from distill.models.batches import BatchUnit
from distill.prompts.classes import ClassPrompts
from distill.prompts.rendering import Prompts
from distill.records import Annotation, Batch, Example, RowCounts, SoftTargets, Span
from distill.students import Seam
from distill.training.module import MakeOptimizer, StudentModule

_NUM_LESSONS, SAMPLE_SIZE = 32, 4  # lessons sampled in all, and in one batch


@dataclass(frozen=True)
class Finding:
    """The result of one check; `passed` is None if it does not apply. A failed one with `is_fatal` stops the run."""

    check: str
    passed: bool | None
    found: str
    expected: str
    remedy: str
    is_fatal: bool

    @property
    def stops(self) -> bool:
        """Whether this finding must stop the run."""
        return self.passed is False and self.is_fatal

    @property
    def problem(self) -> str:
        """The failure as a message."""
        return f"{self.check}: {self.found}; expected: {self.expected}. {self.remedy}"


@dataclass(frozen=True)
class PreflightInput:
    """What a run trains, on which data, on which device.

    `rows` counts what became of the rows of train and of the rationales. `annotation` reads a record of the cache by
    its key; `has_second_teacher`: the records are of a teacher that scored the texts of another one. `example` returns
    an example by its id; `precision` is the context in which a step computes.
    """

    module: StudentModule
    objectives: Mapping[str, Objective]
    lessons: Sequence[Lesson]
    rows: Mapping[str, RowCounts]
    read: Read
    annotation: Callable[[str], Annotation]
    has_second_teacher: bool
    example: Callable[[str], Example]
    prompts: Prompts | ClassPrompts
    seam: Seam
    is_vocabulary_shared: bool
    is_from_scratch: bool
    open_uncut: Callable[[], Any] | None  # the model with all its layers, if the student lacks some
    make_optimizer: MakeOptimizer
    batch_size: int
    microbatch_size: int
    batch_unit: BatchUnit
    num_steps: int
    checkpoint_every: int
    is_averaged: bool
    keeps_best: bool
    num_devices: int
    run_dir: Path
    device: torch.device
    precision: Callable[[], AbstractContextManager[Any]]

    @property
    def token_prompts(self) -> Prompts:
        """The prompts of a student that learns tokens."""
        assert isinstance(self.prompts, Prompts)
        return self.prompts

    @property
    def class_prompts(self) -> ClassPrompts:
        """The prompts of a student that learns classes."""
        assert isinstance(self.prompts, ClassPrompts)
        return self.prompts


@dataclass(frozen=True)
class Sample:
    """A few lessons as one batch; `soft` holds their soft targets as stored in the cache."""

    lessons: tuple[Lesson, ...]
    batch: Batch
    soft: SoftTargets | None


def samples_of(inputs: PreflightInput) -> list[Sample]:
    """Sample lessons: first one for each loss, then the first lessons."""
    places = {(objective.span, objective.source) for objective in inputs.objectives.values()}
    per_loss = [next((i for i, lesson in enumerate(inputs.lessons) if lesson.counts()[place]), 0) for place in places]
    chosen = list(dict.fromkeys([*sorted(per_loss), *range(len(inputs.lessons))]))[:_NUM_LESSONS]
    return [
        _sample(inputs, [inputs.lessons[i] for i in chosen[at : at + SAMPLE_SIZE]])
        for at in range(0, len(chosen), SAMPLE_SIZE)
    ]


def _sample(inputs: PreflightInput, lessons: Sequence[Lesson]) -> Sample:
    targets = (target for lesson in lessons for sequence in lesson.sequences for target in sequence.targets)
    places = [target.soft.place for target in targets if target.soft]
    return Sample(
        tuple(lessons), collated(inputs, lessons, inputs.prompts.end), inputs.read(places) if places else None
    )


def collated(inputs: PreflightInput, lessons: Sequence[Lesson], padding_id: int) -> Batch:
    """Collate the lessons as one whole step."""
    counts = sum((lesson.counts() for lesson in lessons), Counter[tuple[Span, str]]())
    return collate(lessons, counts, padding_id, inputs.read)


def longest(inputs: PreflightInput) -> list[Lesson]:
    """Return as many of the longest lessons as one forward pass takes."""
    ordered = sorted(inputs.lessons, key=lambda lesson: -lesson.num_tokens)
    size = min(inputs.batch_size, inputs.microbatch_size)
    count = size if inputs.batch_unit == "examples" else max(1, size // ordered[0].num_tokens)
    return ordered[:count]


def plain(sequence: TrainingSequence) -> Iterator[TrainingSequence]:
    """Yield a sequence without branches for each branch of a sequence."""
    shared = sequence.ids[: sequence.branches[0]] if sequence.branches else ()
    for start, stop in itertools.pairwise((*(sequence.branches or (0,)), len(sequence.ids))):
        targets = (target.moved(len(shared) - start) for target in sequence.targets if start <= target.start < stop)
        yield TrainingSequence(shared + sequence.ids[start:stop], tuple(targets))


def targets_of(lessons: Sequence[Lesson]) -> Iterator[tuple[TrainingSequence, PlacedTarget]]:
    """Yield every target of the lessons in its plain sequence, in batch order."""
    for whole in (sequence for lesson in lessons for sequence in lesson.sequences):
        yield from ((sequence, target) for sequence in plain(whole) for target in sequence.targets)
