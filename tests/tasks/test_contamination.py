"""Contamination: train examples that share words with validation or test, compared with a slow implementation."""

from __future__ import annotations

import itertools
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.errors import ConfigError
from distill.records import Example, Splits
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


@given(QUESTIONS, QUESTIONS, QUESTIONS, st.integers(1, 5))
def test_overlaps_are_those_of_a_slow_comparison_of_all_pairs(
    train: list[str], validation: list[str], test: list[str], n: int
) -> None:
    splits = splits_of(train, validation, test)
    overlaps = find_overlaps(splits, n)
    pairs = [(overlap.train_id, overlap.other_id, overlap.split) for overlap in overlaps]
    assert len(pairs) == len(set(pairs))
    assert set(pairs) == slow_overlaps(splits, n)
    kept = drop_overlaps(splits, overlaps)
    assert slow_overlaps(kept, n) == set()
    assert len(kept.train) + kept.dropped.get("overlap", 0) == len(splits.train)
    assert (kept.validation, kept.test) == (splits.validation, splits.test)


def test_an_overlap_names_both_examples_and_the_first_shared_ngram() -> None:
    splits = splits_of(["How many “red” apples, exactly, does Ada have?", "Another."], [], ["many RED apples exactly!"])
    (train, _), (test,) = splits.train, splits.test
    assert find_overlaps(splits, 3) == [Overlap(train.id, test.id, "test", "many red apples")]
    assert find_overlaps(splits, 4) == [Overlap(train.id, test.id, "test", "many red apples exactly")]
    assert find_overlaps(splits, 5) == []


def test_dropped_overlaps_are_counted_in_addition_to_dropped_duplicates() -> None:
    splits = splits_of(["one two three", "one two", "four", "FOUR"], ["two three"], ["five"])
    kept = drop_overlaps(splits, find_overlaps(splits, 2))
    assert [e.question for e in kept.train] == ["one two", "four"]
    assert kept.dropped == {"train": 1, "overlap": 1}
    assert drop_overlaps(kept, find_overlaps(kept, 2)) == kept


def test_an_ngram_of_no_words_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected at least 1"):
        find_overlaps(splits_of([], [], []), 0)
