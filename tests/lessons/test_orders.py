"""Law 3: the order of lessons is the same in every version, so that a run can be resumed with another one."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast, get_args

import pytest

from distill.errors import ConfigError
from distill.lessons.join import Lesson, TrainingSequence
from distill.lessons.loader import Arrangement, DistillData, Order, StepSampler, check_batch_size, microbatches_per_step
from distill.records import Prompt
from tests.conftest import read


def lesson_of(num_tokens: int, confidence: float | None = None) -> Lesson:
    """A lesson of so many tokens, the last of which is its answer."""
    prompt = Prompt((0,) * num_tokens, {"answer": (num_tokens - 1, num_tokens)})
    return Lesson((TrainingSequence.of(prompt, "", (), {}),), None, confidence)


def sampler(all_lessons: list[Lesson], **settings: Any) -> StepSampler:
    defaults = {"batch_size": 2, "batch_unit": "examples", "num_microbatches": 1, "num_steps": 1, "seed": 5}
    return StepSampler(all_lessons, **defaults | settings)


LESSONS = [lesson_of(2 + (7 * number) % 23) for number in range(401)]


def test_seven_lessons_have_the_steps_that_they_always_had() -> None:
    steps = itertools.islice(sampler(LESSONS[:7]).steps(), 7)
    assert [*steps] == [[2, 6], [1, 5], [0, 4], [3, 4], [0, 1], [6, 3], [5, 2]]


@pytest.mark.parametrize(
    ("number", "unit", "size", "digest"),
    [
        (61, "examples", 2, "ffb2572f85ee"),
        (61, "examples", 8, "e0d802a48a42"),
        (61, "tokens", 60, "34b5a0361cfe"),
        (401, "examples", 3, "115a130254c1"),
        (401, "tokens", 40, "6bd5727c9b1e"),
        (401, "tokens", 60, "dde8726703c3"),
        (401, "tokens", 200, "ca0746c16f51"),
    ],
)
def test_the_first_thousand_steps_are_those_that_they_always_were(
    number: int, unit: str, size: int, digest: str
) -> None:
    steps = [*itertools.islice(sampler(LESSONS[:number], batch_size=size, batch_unit=unit).steps(), 1000)]
    assert hashlib.sha256(repr(steps).encode()).hexdigest()[:12] == digest


def test_steps_of_few_lessons_of_very_different_lengths_are_those_that_they_always_were() -> None:
    uneven = [lesson_of(2 + (number * number) % 37, (number % 11) / 10) for number in range(24)]
    digest = hashlib.sha256()
    for number, size, chunks, order in itertools.product(range(1, 24, 3), (30, 90), (1, 2), get_args(Order)):
        settings = {"batch_size": size, "batch_unit": "tokens", "num_microbatches": chunks, "seed": number}
        steps = sampler(uneven[:number], arrangement=Arrangement(order=order), **settings).steps()
        digest.update(repr([*itertools.islice(steps, 12)]).encode())
    assert digest.hexdigest()[:12] == "44ed21b44680"


def test_windows_of_tokens_are_those_that_they_always_were() -> None:
    uneven = [lesson_of(2 + (number * number) % 37) for number in range(300)]
    digest = hashlib.sha256()
    for number, size, seed in itertools.product((150,), (40, 120), range(4)):
        steps = sampler(uneven[:number], batch_size=size, batch_unit="tokens", seed=seed).steps()
        digest.update(repr([*itertools.islice(steps, 250)]).encode())
    assert digest.hexdigest()[:12] == "2a13773f44a3"


def test_the_least_confident_lessons_are_the_most_difficult() -> None:
    graded = [lesson_of(9, confidence) for confidence in (0.0, 0.5, 1.0)]
    assert [*map(Arrangement(order="confident_first").difficulty, graded)] == [0.0, -0.5, -1.0]


def test_lessons_are_sorted_by_length_within_windows_of_twenty_steps() -> None:
    falling = [lesson_of(100 - number, 1 - number / 100) for number in range(41)]
    arrangement = Arrangement(order="confident_first")
    steps = itertools.islice(sampler(falling, batch_size=1, arrangement=arrangement).steps(), 41)
    assert [index for (index,) in steps] == [*range(19, -1, -1), *range(39, 19, -1), 40]


def test_full_confidence_belongs_to_the_highest_fifth() -> None:
    graded = [lesson_of(9, confidence) for confidence in (1.0, 0.8, 0.79, 0.6, 0.0, 0.19)]
    assert Arrangement(balance="confidence").epoch(graded) == [0, 1, 2, 3, 4, 5]
    assert Arrangement(balance="confidence").epoch([graded[0], graded[1], graded[4]]) == [0, 1, 2, 2]


def test_a_lesson_without_answer_is_a_stratum_of_its_own() -> None:
    mixed = [replace(lesson_of(9), answer=answer) for answer in ("yes", None, "yes", "no")]
    assert Arrangement(balance="answer").epoch(mixed) == [0, 1, 1, 2, 3, 3]


def test_a_sampler_has_the_length_of_what_it_yields() -> None:
    whole = sampler(LESSONS, batch_size=8, num_steps=5, num_microbatches=3)
    assert len(whole) == len([*whole]) == 15


def test_an_empty_step_is_refused() -> None:
    assert microbatches_per_step(0, 4, 1) == 1
    with pytest.raises(ConfigError, match="batch_size=0 is too small"):
        check_batch_size(0, microbatches_per_step(0, 4, 1), 1)


@pytest.mark.parametrize(("processes", "microbatches", "least"), [(3, 2, 6), (2, 3, 6), (1, 4, 4), (4, 1, 4)])
def test_a_step_has_an_example_for_every_microbatch_of_every_process(
    processes: int, microbatches: int, least: int
) -> None:
    check_batch_size(least, microbatches, processes)
    with pytest.raises(ConfigError, match=f"set it to at least {least}"):
        check_batch_size(least - 1, microbatches, processes)


def test_a_process_reads_its_own_microbatches_from_the_step_that_comes_next() -> None:
    settings: dict[str, Any] = {"batch_size": 6, "batch_unit": "examples", "num_steps": 9, "seed": 4}
    arrangement = Arrangement(order="short_first")
    data = DistillData(
        train=LESSONS[:30],
        validation=[],
        read=read,
        microbatch_size=1,
        arrangement=arrangement,
        padding_id=0,
        num_workers=0,
        **settings,
    )
    data.trainer = cast("Any", SimpleNamespace(world_size=2, global_rank=1, global_step=5))
    place: dict[str, Any] = {"num_microbatches": 3, "rank": 1, "world_size": 2, "start_step": 5}
    expected = sampler(LESSONS[:30], arrangement=arrangement, **settings, **place)
    assert [*data.train_dataloader().sampler] == [*expected]
    assert len([*expected]) == (9 - 5) * 3
