"""Laws 2, 3, 5, 8: which position learns what, whatever stands beside it, and how many of them there are."""

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
from distill.lessons.loader import Arrangement, StepSampler
from distill.prompts.cues import Prompts
from tests.conftest import lessons


def sampler(given: list[Lesson], **settings: Any) -> StepSampler:
    """Steps of four examples, where nothing else is said."""
    plain = {"batch_size": 4, "batch_unit": "examples", "num_microbatches": 1, "num_steps": 1, "seed": 0}
    return StepSampler(given, **plain | settings)


@pytest.mark.parametrize(("num_microbatches", "world_size"), [(1, 1), (4, 1), (8, 1), (2, 2), (1, 4), (3, 2)])
def test_a_step_has_the_same_examples_for_any_number_of_processes(
    prompts: Prompts, num_microbatches: int, world_size: int
) -> None:
    given = lessons(prompts, 11)

    def dealt(number: int, size: int, **start: int) -> list[list[Any]]:
        ranks = [
            list(
                sampler(
                    given,
                    batch_size=8,
                    num_microbatches=number,
                    num_steps=4,
                    seed=3,
                    rank=r,
                    world_size=size,
                    **start,
                )
            )
            for r in range(size)
        ]
        return [
            [m for rank in ranks for m in rank[s * number : (s + 1) * number]] for s in range(len(ranks[0]) // number)
        ]

    whole, cut = dealt(1, 1), dealt(num_microbatches, world_size)
    assert len(cut) == 4
    for (one,), parts in zip(whole, cut, strict=True):
        assert sorted(one.indices) == sorted(index for part in parts for index in part.indices)
        assert all(part.counts == one.counts for part in parts)
        assert one.counts == sum((given[index].counts() for index in one.indices), Counter())
    assert dealt(num_microbatches, world_size, start_step=2) == cut[2:]
    seen = Counter(index for (one,) in whole for index in one.indices)
    assert set(seen) == set(range(11))
    assert max(seen.values()) - min(seen.values()) <= 1


def test_another_seed_is_another_order(prompts: Prompts) -> None:
    given = lessons(prompts, 11)
    orders = [next(sampler(given, batch_size=3, seed=seed).steps()) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_lessons_of_similar_length_share_a_step(prompts: Prompts) -> None:
    given = lessons(prompts, 48)
    lengths = [lesson.num_tokens for lesson in given]
    steps = [[lengths[index] for index in step] for step in itertools.islice(sampler(given).steps(), 12)]
    assert sorted(length for step in steps for length in step) == sorted(lengths)
    by_length = sorted(sorted(step) for step in steps)
    assert all(former[-1] <= latter[0] for former, latter in itertools.pairwise(by_length))
    assert [max(step) for step in steps] != sorted(max(step) for step in steps)


def test_a_step_with_fewer_examples_than_chunks_is_refused(prompts: Prompts) -> None:
    with pytest.raises(ConfigError, match="batch_size=3 is too small for 2 processes x 2 microbatches"):
        sampler(lessons(prompts, 5), batch_size=3, num_microbatches=2, world_size=2)


def graded(prompts: Prompts, number: int) -> list[Lesson]:
    """Lessons whose teacher is ever less sure, in an order of their own; every fifth has another answer."""
    given = lessons(prompts, number)
    return [
        replace(x, answer="no" if i % 5 else "yes", confidence=((7 * i) % number) / number) for i, x in enumerate(given)
    ]


@pytest.mark.parametrize("order", ["short_first", "confident_first"])
def test_the_first_epoch_goes_from_easy_to_hard_and_the_second_is_shuffled(order: Any, prompts: Prompts) -> None:
    given = graded(prompts, 200)
    steps = list(itertools.islice(sampler(given, batch_size=2, arrangement=Arrangement(order=order)).steps(), 200))
    first, second = steps[:100], steps[100:]
    assert sorted(itertools.chain(*first)) == sorted(itertools.chain(*second)) == list(range(200))
    hardness = [x.num_tokens if order == "short_first" else -x.confidence for x in given]
    sorted_ = sorted(hardness)

    def displaced(epoch: list[list[int]]) -> int:
        """How far, at most, a lesson is from where it would be if all were sorted."""
        seen = [hardness[index] for step in epoch for index in step]
        bounds = [(bisect.bisect_left(sorted_, x), bisect.bisect_right(sorted_, x) - 1) for x in seen]
        return max(max(first - at, at - last, 0) for at, (first, last) in enumerate(bounds))

    assert displaced(first) <= 2 * 20 + 2 < 100 < displaced(second)  # lengths are sorted in windows of twenty steps
    resumed = list(sampler(given, batch_size=2, arrangement=Arrangement(order=order), num_steps=150, start_step=60))
    assert [list(part.indices) for part in resumed] == steps[60:150]


GROUPS = {"answer": lambda lesson: lesson.answer, "confidence": lambda lesson: int(5 * lesson.confidence)}


@pytest.mark.parametrize(("balance", "group"), GROUPS.items(), ids=GROUPS)
def test_balancing_makes_strata_equally_frequent_and_keeps_every_lesson(
    balance: Any, group: Callable[[Lesson], Any], prompts: Prompts
) -> None:
    given = [lesson for i, lesson in enumerate(graded(prompts, 40)) if i % 3 or lesson.confidence > 0.5]
    epoch = Arrangement(balance=balance).epoch(given)
    seen = Counter(group(given[index]) for index in epoch)
    assert len(seen) > 1
    assert len(set(seen.values())) == 1
    assert set(epoch) == set(range(len(given)))
    assert len(set(Counter(group(lesson) for lesson in given).values())) > 1  # they were not from the start
    steps = sampler(given, batch_size=1, arrangement=Arrangement(balance=balance)).steps()
    assert Counter(index for (index,) in itertools.islice(steps, len(epoch))) == Counter(epoch)


def test_ordering_by_a_missing_confidence_is_refused(prompts: Prompts) -> None:
    with pytest.raises(ConfigError, match="7 of 7 lessons lack the teacher's confidence"):
        Arrangement(order="confident_first").check(lessons(prompts, 7))
    Arrangement(order="short_first", balance="answer").check(lessons(prompts, 7))


def test_only_the_step_between_two_epochs_mixes_lengths(prompts: Prompts) -> None:
    given = lessons(prompts, 50)
    steps = list(itertools.islice(sampler(given).steps(), 50))  # four epochs of twelve and a half steps
    assert all(len(step) == 4 for step in steps)
    assert set(Counter(index for step in steps for index in step).values()) == {4}
    spreads = [max(x) - min(x) for x in ([given[index].num_tokens for index in step] for step in steps)]
    assert sum(spread > 40 for spread in spreads) <= 4


@pytest.mark.parametrize("batch_size", [100, 400, 1600])
def test_a_step_of_tokens_is_as_full_as_similar_lengths_allow(batch_size: int, prompts: Prompts) -> None:
    given = lessons(prompts, 48)
    steps = list(itertools.islice(sampler(given, batch_size=batch_size, batch_unit="tokens").steps(), 60))
    whole = Counter(index for step in steps for index in step)
    assert max(whole.values()) - min(whole.values()) <= 1
    sizes = [len(step) * max(given[index].num_tokens for index in step) for step in steps]
    assert all(size <= batch_size or len(step) == 1 for size, step in zip(sizes, steps, strict=True))
    assert len({len(step) for step in steps}) > 1
    dealt = list(sampler(given, batch_size=batch_size, batch_unit="tokens", num_steps=60))
    resumed = sampler(given, batch_size=batch_size, batch_unit="tokens", num_steps=60, start_step=17)
    assert [list(part.indices) for part in dealt] == steps
    assert list(resumed) == dealt[17:]


def test_every_microbatch_of_a_step_of_tokens_has_an_example(prompts: Prompts) -> None:
    given = lessons(prompts, 48)
    settings = {"batch_size": 100, "batch_unit": "tokens", "num_microbatches": 2, "world_size": 2, "num_steps": 40}
    parts = [part for rank in (0, 1) for part in sampler(given, rank=rank, **settings)]
    assert len(parts) == 160
    assert all(part.indices for part in parts)
