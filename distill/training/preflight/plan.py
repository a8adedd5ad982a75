"""What is to be trained, what a check says of it, and the few lessons that are looked at."""

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
from distill.lessons.join import Lesson, Read, TrainingSequence
from distill.lessons.loader import BatchUnit
from distill.losses import Objective
from distill.prompts.cues import Prompts
from distill.records import Annotation, Batch, Prompt, SoftTargets, Span
from distill.training.module import MakeOptimizer, StudentModule

_LESSONS, TOGETHER = 32, 4  # that are looked at, and of these that pass through the model


@dataclass(frozen=True)
class Finding:
    """What one check found. `passed` is None where it does not apply; a failure that `is_fatal` must stop the run."""

    check: str
    passed: bool | None
    found: str
    wanted: str
    remedy: str
    is_fatal: bool

    @property
    def stops(self) -> bool:
        """Whether nothing good can come of training."""
        return self.passed is False and self.is_fatal

    @property
    def problem(self) -> str:
        """The failure as one sentence or two."""
        return f"{self.check}: {self.found}; wanted: {self.wanted}. {self.remedy}"


@dataclass(frozen=True)
class Plan:
    """What is to be trained, with what, and where.

    `annotation` reads a record of the cache by its key, `precision` is the context in which a step computes.
    """

    module: StudentModule
    objectives: Mapping[str, Objective]
    lessons: Sequence[Lesson]
    read: Read
    annotation: Callable[[str], Annotation]
    prompts: Prompts
    is_vocabulary_shared: bool
    is_from_scratch: bool
    make_optimizer: MakeOptimizer
    batch_size: int
    microbatch_size: int
    batch_unit: BatchUnit
    num_steps: int
    num_devices: int
    run_dir: Path
    device: torch.device
    precision: Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Sample:
    """A few lessons, as they are taught together; `soft` is what the cache holds for them, as it is stored."""

    lessons: tuple[Lesson, ...]
    batch: Batch
    soft: SoftTargets | None


def samples_of(plan: Plan) -> list[Sample]:
    """First a lesson for each loss, then the first ones."""
    places = {(objective.span, objective.source) for objective in plan.objectives.values()}
    having = [next((i for i, lesson in enumerate(plan.lessons) if lesson.counts()[place]), 0) for place in places]
    chosen = list(dict.fromkeys([*sorted(having), *range(len(plan.lessons))]))[:_LESSONS]
    return [
        _sample(plan, [plan.lessons[i] for i in chosen[at : at + TOGETHER]]) for at in range(0, len(chosen), TOGETHER)
    ]


def _sample(plan: Plan, lessons: Sequence[Lesson]) -> Sample:
    places = [soft.place for lesson in lessons for s in lesson.sequences for soft in s.soft.values()]
    return Sample(tuple(lessons), collated(plan, lessons, plan.prompts.end), plan.read(places) if places else None)


def collated(plan: Plan, lessons: Sequence[Lesson], padding_id: int) -> Batch:
    """The lessons as a whole step."""
    counts = sum((lesson.counts() for lesson in lessons), Counter[tuple[Span, str]]())
    return collate(lessons, counts, padding_id, plan.read)


def longest(plan: Plan) -> list[Lesson]:
    """As many of the longest lessons as pass through the model together."""
    ordered = sorted(plan.lessons, key=lambda lesson: -lesson.num_tokens)
    size = min(plan.batch_size, plan.microbatch_size)
    number = size if plan.batch_unit == "examples" else max(1, size // ordered[0].num_tokens)
    return ordered[:number]


def _prompts(sequence: TrainingSequence) -> Iterator[Prompt]:
    """What a sequence is without its branches: a prompt for each."""
    prompt = sequence.prompt
    shared = prompt.ids[: prompt.branches[0]] if prompt.branches else ()
    for start, stop in itertools.pairwise((*(prompt.branches or (0,)), len(prompt.ids))):
        move = len(shared) - start
        spans = {name: (a + move, b + move) for name, (a, b) in prompt.spans.items() if start <= a < stop}
        yield Prompt(shared + prompt.ids[start:stop], spans)


def spans_of(lessons: Sequence[Lesson]) -> Iterator[tuple[TrainingSequence, Prompt, Span, int, int]]:
    """Every span of the lessons, in the order in which a batch has them."""
    for sequence in (sequence for lesson in lessons for sequence in lesson.sequences):
        for prompt in _prompts(sequence):
            for span, (start, stop) in sorted(prompt.spans.items(), key=lambda item: item[1]):
                yield sequence, prompt, span, start, stop
