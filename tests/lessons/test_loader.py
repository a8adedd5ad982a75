"""Law 3: the order of lessons and their division into steps and microbatches."""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from distill.errors import ConfigError
from distill.lessons.join import Lesson
from distill.lessons.loader import Arrangement, DistillData, StepSampler, microbatches_per_step
from distill.models.batches import BatchLimit
from distill.prompts.rendering import Prompts
from tests.conftest import lessons, read
from tests.lessons.test_orders import lesson_of


def sampler(all_lessons: list[Lesson], **settings: Any) -> StepSampler:
    """A sampler with four examples per step, with changed settings."""
    defaults = {"batch_size": 4, "batch_unit": "examples", "num_microbatches": 1, "num_steps": 1, "seed": 0}
    return StepSampler(all_lessons, **defaults | settings)


def distill_data(validation: list[Lesson], **settings: Any) -> DistillData:
    """The data of a run that validates on these lessons."""
    defaults = {"train": validation, "read": read, "batch_size": 8, "arrangement": Arrangement(), "num_steps": 1}
    return DistillData(validation=validation, seed=0, padding_id=0, num_workers=0, **defaults | settings)


@pytest.mark.parametrize(("num_microbatches", "world_size"), [(1, 1), (4, 1), (8, 1), (2, 2), (1, 4), (3, 2)])
def test_a_step_has_the_same_examples_for_any_number_of_processes(
    prompts: Prompts, num_microbatches: int, world_size: int
) -> None:
    all_lessons = lessons(prompts, 11)

    def steps_of_microbatches(number: int, num_processes: int, **start: int) -> list[list[Any]]:
        ranks = [
            list(
                sampler(
                    all_lessons,
                    batch_size=8,
                    num_microbatches=number,
                    num_steps=4,
                    seed=3,
                    rank=rank_index,
                    world_size=num_processes,
                    **start,
                )
            )
            for rank_index in range(num_processes)
        ]
        return [
            [m for rank in ranks for m in rank[step_index * number : (step_index + 1) * number]]
            for step_index in range(len(ranks[0]) // number)
        ]

    undivided, divided = steps_of_microbatches(1, 1), steps_of_microbatches(num_microbatches, world_size)
    assert len(divided) == 4
    for (step,), microbatches in zip(undivided, divided, strict=True):
        assert sorted(step.indices) == sorted(index for microbatch in microbatches for index in microbatch.indices)
        assert all(microbatch.counts == step.counts for microbatch in microbatches)
        assert step.counts == sum((all_lessons[index].counts() for index in step.indices), Counter())
    assert steps_of_microbatches(num_microbatches, world_size, start_step=2) == divided[2:]
    num_uses = Counter(index for (step,) in undivided for index in step.indices)
    assert set(num_uses) == set(range(11))
    assert max(num_uses.values()) - min(num_uses.values()) <= 1


def test_every_epoch_has_an_order_of_its_own_that_the_seed_decides(prompts: Prompts) -> None:
    all_lessons = lessons(prompts, 36)

    def epochs(seed: int) -> list[list[list[int]]]:
        steps = list(itertools.islice(sampler(all_lessons, batch_size=2, seed=seed).steps(), 72))
        return [steps[start : start + 18] for start in range(0, 72, 18)]

    first, *others = epochs(0)
    for number, epoch in enumerate([first, *others]):
        assert sorted(itertools.chain(*epoch)) == list(range(36)), number
    assert all(epoch != first for epoch in others)
    assert len({tuple(map(tuple, epoch)) for epoch in (first, *others)}) == 4
    assert epochs(0) == [first, *others]
    assert all(left != right for left, right in zip(epochs(1), epochs(0), strict=True))


@pytest.mark.parametrize("unit", ["examples", "tokens"])
def test_batches_hold_as_much_as_the_limit_allows_and_no_more(unit: Any) -> None:
    lengths, size = [7, 3, 9, 3, 5, 8, 2, 40], {"examples": 3, "tokens": 20}[unit]
    batches = BatchLimit(size, unit).batches(lengths)
    assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))
    sizes = [
        len(batch) * max(lengths[index] for index in batch) if unit == "tokens" else len(batch) for batch in batches
    ]
    assert all(taken <= size or len(batch) == 1 for taken, batch in zip(sizes, batches, strict=True))
    expected = {"examples": [[6, 1, 3], [4, 0, 5], [2, 7]], "tokens": [[6, 1, 3, 4], [0, 5], [2], [7]]}
    assert batches == expected[unit]
    assert BatchLimit(size, unit).batches([]) == []


def test_validation_reads_no_more_at_once_than_training(prompts: Prompts) -> None:
    validation = lessons(prompts, 23)
    for unit, size in (("examples", 4), ("tokens", 300)):
        data = distill_data(validation, microbatch_size=size, batch_unit=unit)
        batches = list(data.val_dataloader())
        shapes = [batch.input_ids_BT.numel() if unit == "tokens" else len(batch.example_ids) for batch in batches]
        assert max(shapes) <= size
        assert sorted(name for batch in batches for name in batch.example_ids) == sorted(
            id_ for lesson in validation for id_ in lesson.example_ids
        )


def test_another_seed_is_another_order(prompts: Prompts) -> None:
    all_lessons = lessons(prompts, 11)
    orders = [next(sampler(all_lessons, batch_size=3, seed=seed).steps()) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_lessons_of_similar_length_share_a_step(prompts: Prompts) -> None:
    all_lessons = lessons(prompts, 48)
    lengths = [lesson.num_tokens for lesson in all_lessons]
    steps = [[lengths[index] for index in step] for step in itertools.islice(sampler(all_lessons).steps(), 12)]
    assert sorted(length for step in steps for length in step) == sorted(lengths)
    by_length = sorted(sorted(step) for step in steps)
    assert all(former[-1] <= latter[0] for former, latter in itertools.pairwise(by_length))
    assert [max(step) for step in steps] != sorted(max(step) for step in steps)


def test_a_step_with_fewer_examples_than_chunks_is_refused(prompts: Prompts) -> None:
    with pytest.raises(ConfigError, match="batch_size=3 is too small for 2 processes x 2 microbatches"):
        sampler(lessons(prompts, 5), batch_size=3, num_microbatches=2, world_size=2)


def graded_lessons(prompts: Prompts, number: int) -> list[Lesson]:
    """Lessons in scrambled order of the teacher's confidence; every fifth has another answer."""
    ungraded = lessons(prompts, number)
    return [
        replace(lesson, answer="no" if i % 5 else "yes", confidence=((7 * i) % number) / number)
        for i, lesson in enumerate(ungraded)
    ]


@pytest.mark.parametrize("order", ["short_first", "confident_first"])
def test_the_first_epoch_goes_from_easy_to_hard_and_the_second_is_shuffled(order: Any, prompts: Prompts) -> None:
    all_lessons = graded_lessons(prompts, 200)
    steps = list(
        itertools.islice(sampler(all_lessons, batch_size=2, arrangement=Arrangement(order=order)).steps(), 200)
    )
    first, second = steps[:100], steps[100:]
    assert sorted(itertools.chain(*first)) == sorted(itertools.chain(*second)) == list(range(200))
    hardness = [x.num_tokens if order == "short_first" else -x.confidence for x in all_lessons]
    sorted_hardness = sorted(hardness)

    def max_displacement(epoch: list[list[int]]) -> int:
        """The largest distance of a lesson from its position in sorted order."""
        epoch_hardness = [hardness[index] for step in epoch for index in step]
        bounds = [
            (bisect.bisect_left(sorted_hardness, x), bisect.bisect_right(sorted_hardness, x) - 1)
            for x in epoch_hardness
        ]
        return max(max(first - position, position - last, 0) for position, (first, last) in enumerate(bounds))

    assert (
        max_displacement(first) <= 2 * 20 + 2 < 100 < max_displacement(second)
    )  # lengths are sorted in windows of twenty steps
    resumed = list(
        sampler(all_lessons, batch_size=2, arrangement=Arrangement(order=order), num_steps=150, start_step=60)
    )
    assert [list(microbatch.indices) for microbatch in resumed] == steps[60:150]


GROUPS = {"answer": lambda lesson: lesson.answer, "confidence": lambda lesson: int(5 * lesson.confidence)}


@pytest.mark.parametrize(("balance", "group"), GROUPS.items(), ids=GROUPS)
def test_balancing_makes_strata_equally_frequent_and_keeps_every_lesson(
    balance: Any, group: Callable[[Lesson], Any], prompts: Prompts
) -> None:
    all_lessons = [lesson for i, lesson in enumerate(graded_lessons(prompts, 40)) if i % 3 or lesson.confidence > 0.5]
    epoch = Arrangement(balance=balance).epoch(all_lessons)
    stratum_sizes = Counter(group(all_lessons[index]) for index in epoch)
    assert len(stratum_sizes) > 1
    assert len(set(stratum_sizes.values())) == 1
    assert set(epoch) == set(range(len(all_lessons)))
    assert len(set(Counter(group(lesson) for lesson in all_lessons).values())) > 1  # they were unequal before
    steps = sampler(all_lessons, batch_size=1, arrangement=Arrangement(balance=balance)).steps()
    assert Counter(index for (index,) in itertools.islice(steps, len(epoch))) == Counter(epoch)


def test_ordering_by_a_missing_confidence_is_refused(prompts: Prompts) -> None:
    with pytest.raises(ConfigError, match="7 of 7 lessons lack the teacher's confidence"):
        Arrangement(order="confident_first").check(lessons(prompts, 7))
    Arrangement(order="short_first", balance="answer").check(lessons(prompts, 7))


def test_only_the_step_between_two_epochs_mixes_lengths(prompts: Prompts) -> None:
    all_lessons = lessons(prompts, 50)
    steps = list(itertools.islice(sampler(all_lessons).steps(), 50))  # four epochs of twelve and a half steps
    assert all(len(step) == 4 for step in steps)
    assert set(Counter(index for step in steps for index in step).values()) == {4}
    spreads = [max(x) - min(x) for x in ([all_lessons[index].num_tokens for index in step] for step in steps)]
    assert sum(spread > 40 for spread in spreads) <= 4


@pytest.mark.parametrize("number", [1, 3, 4, 7, 8])
def test_a_step_may_hold_several_epochs_of_few_lessons(number: int, prompts: Prompts) -> None:
    steps = list(itertools.islice(sampler(lessons(prompts, number), batch_size=8).steps(), 2 * number))
    assert [len(step) for step in steps] == [8] * (2 * number)
    num_uses = Counter(index for step in steps for index in step)
    assert num_uses == dict.fromkeys(range(number), 16)


@pytest.mark.parametrize("batch_size", [100, 400, 1600])
def test_a_step_of_tokens_is_as_full_as_similar_lengths_allow(batch_size: int, prompts: Prompts) -> None:
    all_lessons = lessons(prompts, 48)
    steps = list(itertools.islice(sampler(all_lessons, batch_size=batch_size, batch_unit="tokens").steps(), 60))
    num_uses = Counter(index for step in steps for index in step)
    assert max(num_uses.values()) - min(num_uses.values()) <= 1
    sizes = [len(step) * max(all_lessons[index].num_tokens for index in step) for step in steps]
    assert all(size <= batch_size or len(step) == 1 for size, step in zip(sizes, steps, strict=True))
    assert len({len(step) for step in steps}) > 1
    microbatches = list(sampler(all_lessons, batch_size=batch_size, batch_unit="tokens", num_steps=60))
    resumed = sampler(all_lessons, batch_size=batch_size, batch_unit="tokens", num_steps=60, start_step=17)
    assert [list(microbatch.indices) for microbatch in microbatches] == steps
    assert list(resumed) == microbatches[17:]


def test_the_step_between_two_epochs_holds_no_more_tokens_either() -> None:
    lengths = [20, 5, 10, 5, 10, 10]  # in some epochs a step of short ones is left over
    for seed in range(20):
        steps = sampler([lesson_of(n) for n in lengths], batch_size=60, batch_unit="tokens", seed=seed).steps()
        taken = [len(step) * max(lengths[index] for index in step) for step in itertools.islice(steps, 60)]
        assert max(taken) <= 60


def test_every_microbatch_of_a_step_of_tokens_has_an_example(prompts: Prompts) -> None:
    all_lessons = lessons(prompts, 48)
    settings = {"batch_size": 100, "batch_unit": "tokens", "num_microbatches": 2, "world_size": 2, "num_steps": 40}
    microbatches = [microbatch for rank in (0, 1) for microbatch in sampler(all_lessons, rank=rank, **settings)]
    assert len(microbatches) == 160
    assert all(microbatch.indices for microbatch in microbatches)


@pytest.mark.parametrize(
    ("examples", "microbatch", "processes", "expected"), [(8, 2, 1, 4), (8, 2, 2, 2), (9, 2, 2, 3), (1, 4, 2, 1)]
)
def test_a_process_has_microbatches_for_its_part_of_a_step(
    examples: int, microbatch: int, processes: int, expected: int
) -> None:
    assert microbatches_per_step(examples, microbatch, processes) == expected
