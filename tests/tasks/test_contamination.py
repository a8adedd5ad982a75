"""Contamination: train examples that share words with validation or test, compared with a slow implementation."""

from __future__ import annotations

import itertools
import random
import time
import tracemalloc
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.errors import ConfigError
from distill.records import Example, RowCounts, Splits
from distill.tasks.contamination import Overlap, drop_overlaps, find_overlaps

WORDS = st.sampled_from(["a", "B", "b", "c’s", "don't", "ﬁn", "fin", "3.5", "-", "?!", "  "])
QUESTIONS = st.lists(st.lists(WORDS, max_size=7).map(" ".join), max_size=6)


def splits_of(train: list[str], validation: list[str], test: list[str]) -> Splits:
    return Splits.disjoint(*([Example(question) for question in part] for part in (train, validation, test)))


def slow_overlaps(splits: Splits, n: int) -> set[tuple[str, str, str]]:
    """Compare every pair of questions at every pair of positions."""

    def words(text: str) -> list[str]:
        folded = unicodedata.normalize("NFKC", text).casefold()
        for mark in [c for c in set(folded) if unicodedata.category(c)[0] == "P"]:
            folded = folded.replace(mark, " ")
        return folded.split()

    def is_shared(left: list[str], right: list[str]) -> bool:
        if len(left) < n or len(right) < n:
            return left == right != []
        positions = itertools.product(range(len(left) - n + 1), range(len(right) - n + 1))
        return any(all(left[i + k] == right[j + k] for k in range(n)) for i, j in positions)

    others = [("validation", e) for e in splits.validation] + [("test", e) for e in splits.test]
    return {
        (e.id, other.id, split)
        for e in splits.train
        for split, other in others
        if is_shared(words(e.question), words(other.question))
    }


@settings(deadline=None)  # the first example of a busy machine may take long
@given(QUESTIONS, QUESTIONS, QUESTIONS, st.integers(1, 5))
def test_overlaps_are_those_of_a_slow_comparison_of_all_pairs(
    train: list[str], validation: list[str], test: list[str], n: int
) -> None:
    splits = splits_of(train, validation, test)
    overlaps = find_overlaps(splits, n)
    pairs = [(overlap.train_id, overlap.other_id, overlap.split) for overlap in overlaps]
    slow = slow_overlaps(splits, n)
    assert set(pairs) <= slow
    assert [train_id for train_id, _, _ in pairs] == [e.id for e in splits.train if e.id in {pair[0] for pair in slow}]
    kept = drop_overlaps(splits, overlaps)
    assert slow_overlaps(kept, n) == set()
    assert len(kept.train) + kept.counts["train"].lost.get("shares words with held-out", 0) == len(splits.train)
    assert (kept.validation, kept.test) == (splits.validation, splits.test)


def test_an_overlap_names_both_examples_and_the_first_shared_ngram() -> None:
    splits = splits_of(["How many “red” apples, exactly, does Ada have?", "Another."], [], ["many RED apples exactly!"])
    (train, _), (test,) = splits.train, splits.test
    assert find_overlaps(splits, 3) == [Overlap(train.id, test.id, "test", "many red apples")]
    assert find_overlaps(splits, 4) == [Overlap(train.id, test.id, "test", "many red apples exactly")]
    assert find_overlaps(splits, 5) == []


def test_dropped_overlaps_are_counted_in_addition_to_dropped_duplicates() -> None:
    splits = splits_of(["one two three", "one two", "four", "four "], ["two three"], ["five"])
    kept = drop_overlaps(splits, find_overlaps(splits, 2))
    assert [e.question for e in kept.train] == ["one two", "four"]
    assert kept.counts["train"] == RowCounts(4, {"repeated": 1, "shares words with held-out": 1}, 2)
    assert drop_overlaps(kept, find_overlaps(kept, 2)) == kept


TEMPLATE = "Read the review with care and say whether it is good: "


@pytest.mark.parametrize(("num_train", "num_test"), [(40, 30), (40, 4), (4, 30)])
def test_wording_that_all_questions_share_is_no_overlap(num_train: int, num_test: int) -> None:
    train = [f"{TEMPLATE} {'test' if i == 1 else 'train'} {i} is about {i} films" for i in range(num_train)]
    test = [f"{TEMPLATE} test {i} has {i} actors" for i in range(num_test)]
    splits = splits_of([*train, f"{TEMPLATE} test 3 has 3 actors."], [], test)
    (overlap,) = find_overlaps(splits, 8)
    assert (overlap.train_id, overlap.other_id) == (splits.train[-1].id, splits.test[3].id)
    assert overlap.ngram.endswith("3 has 3 actors")


def test_questions_that_copy_a_few_held_out_ones_overlap_once_each() -> None:
    copied = [f"{i} and {i + 1} and {i + 2} and {i + 3}" for i in range(10)]
    splits = splits_of([f"{n} {text} again" for text in copied for n in "ab"], copied[:1], copied[1:])
    assert [o.train_id for o in find_overlaps(splits, 7)] == [example.id for example in splits.train]


def test_long_questions_are_compared_in_seconds() -> None:
    rng = random.Random(0)
    words = [f"w{i}" for i in range(10_000)]
    texts = [" ".join(rng.choices(words, k=4000)) for _ in range(200)]
    splits = splits_of(texts[:150], [], texts[150:])
    start = time.process_time()
    assert find_overlaps(splits, 8) == []
    assert time.process_time() - start < 1.5  # 0.25 where nothing else runs; comparing all pairs takes minutes


def test_a_template_around_every_question_takes_little_memory() -> None:
    train, test = ([f"{TEMPLATE} {name} number {i}" for i in range(1000)] for name in ("train", "test"))
    splits = splits_of(train, [], test)
    tracemalloc.start()
    assert find_overlaps(splits, 8) == []
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6  # a pair of questions per overlap would take 200 MB


def test_an_ngram_of_no_words_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected at least 1"):
        find_overlaps(splits_of([], [], []), 0)
