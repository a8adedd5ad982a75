"""A rationale that is kept led to the right answer and is sound; any other has one reason, always the same one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.annotation.rationales import check, is_foreign, leaks, repetition
from distill.records import Example
from tests.annotation.conftest import alone, checks, reasons, said, same


def test_too_few_and_too_many_words_are_told_apart() -> None:
    settings = {"min_words": 3, "max_words": 5}
    given = ["One two.", "One, two: three!", "One two three four five.", "One two three four five six."]
    assert [alone(text, **settings) for text in given] == ["too short", None, None, "too long"]
    assert alone("84/2 = 42", **settings) is None
    assert alone("40 + 2 don't.", min_words=4) == "too short"
    assert alone("這部電影很好看", min_words=7, max_words=7) is None


def test_saying_the_same_over_and_over_is_repetitive() -> None:
    assert repetition("very " * 7) == 1 - 1 / 4
    assert repetition("It is good. It is good. It is bad. It is good.") == max(1 - 2 / 4, 1 - 6 / 9)
    assert repetition("Yes. Yes. No.") == pytest.approx(1 / 3)
    assert repetition("None of these words is said again.") == repetition("") == 0
    assert alone("Yes. Yes. Yes. No.", max_repetition=0.49) == "repetitive"
    assert alone("Yes. Yes. Yes. No.", max_repetition=0.5) is None
    assert alone("It costs 3.5. It costs 3.7.", max_repetition=0.0) is None


def test_a_text_most_of_whose_letters_are_of_another_script_is_foreign() -> None:
    assert alone("Фильм хвалят, it is warm.", script="LATIN") == "foreign"
    assert alone("The film is called Зеркало.", script="latin") is None
    assert alone("84 / 2 = 42.", script="LATIN") is None
    assert not is_foreign("ab бв", "LATIN")
    assert not is_foreign("ab бв", "CYRILLIC")
    assert alone("這部電影很好看", script="CJK") is None
    assert alone("Ein schöner Film, naïve Ｗ.", script="LATIN") is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("42", "42"),
        ("$42.", "42"),
        ("The answer is 42.", "42"),
        ("It is positive.", "positive"),
        ("It’s positive!", "positive"),
        ("So the final answer: 'positive'", "positive"),
        ("The sentiment is positive because warm and funny praise the film.", "positive"),
        ("Answer: 42, since 84 / 2 = 42.", "42"),
        ("The answer is (3 + 5) * 2", "(3 + 5) * 2"),
    ],
)
def test_an_answer_in_the_place_of_reasoning_is_a_leak(text: str, answer: str) -> None:
    assert leaks(text, answer)
    assert alone(text, answer, leak=True) == "leaks the answer"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("84 / 2 = 42", "42"),
        ("42 / 1 = 42", "42"),
        ("The answer is 42 / 2 = 21.", "42"),
        ("The answer is 42.5 less one half.", "42"),
        ("The result is 8 x 2.", "8"),
        ("The words are warm, so the sentiment is positive.", "positive"),
        ("This is positive language.", "positive"),
        ("Positive words like warm and funny.", "positive"),
        ("The answer is positively warm.", "positive"),
    ],
)
def test_an_answer_that_reasoning_comes_to_is_no_leak(text: str, answer: str) -> None:
    assert alone(text, answer, leak=True) is None


def test_the_same_text_of_one_example_is_kept_once() -> None:
    given = [said("8", "So it is."), said("7", "So it is."), said("7", "so  it is."), said("7", "So it must be.")]
    assert reasons(given, gold="7") == ["disagrees", None, "near duplicate", None]


def test_no_more_of_an_example_are_kept_than_are_wanted() -> None:
    given = [said("8"), *(said("7", f"For the {k}th time.") for k in range(4))]
    assert reasons(given, gold="7", per_example=2) == ["disagrees", None, None, "surplus", "surplus"]
    assert reasons([*given, given[1]], gold="7", per_example=1)[1:] == [None, *["surplus"] * 3, "near duplicate"]


def several(texts: Sequence[tuple[int, str]], **settings: Any) -> list[str | None]:
    """Reasons of texts of several examples, each of which is right."""
    examples = [Example(f"Question {number}?", "7") for number in sorted({number for number, _ in texts})]
    samples = {e.id: [said("7", t) for n, t in texts if e.question == f"Question {n}?"] for e in examples}
    return [one.reason for one in check(examples, samples, {}, same, checks(**settings))]


def test_a_text_much_like_another_examples_is_a_near_duplicate_of_it() -> None:
    # Runs of three words: 5 and 5, of which 4 are shared; 4 / 6.
    given = [(1, "a b c d e f g"), (2, "a b c d e f h")]
    assert several(given, near_duplicates=4 / 6) == [None, "near duplicate"]
    assert several(given, near_duplicates=0.67) == [None, None]
    assert several(given) == [None, None]
    assert several([(1, given[0][1]), (1, given[1][1])], near_duplicates=0.1) == [None, None]  # one example's own
    assert several([(1, "Yes."), (2, "yes"), (3, "Yes yes.")], near_duplicates=1.0) == [None, "near duplicate", None]


def test_a_text_that_was_not_kept_makes_none_a_near_duplicate() -> None:
    given = [(1, "one two three four"), (1, "five six seven"), (2, "five six seven"), (3, "five six seven")]
    found = several(given, near_duplicates=0.5, per_example=1)
    assert found == [None, "surplus", None, "near duplicate"]


@given(
    st.lists(st.tuples(st.integers(0, 5), st.lists(st.sampled_from("abcd"), max_size=12)), max_size=20),
    st.sampled_from([0.1, 0.25, 1 / 3, 0.5, 0.55, 2 / 3, 0.7, 0.9, 1.0]),
    st.sampled_from([None, 1, 2]),
)
def test_near_duplicates_are_those_that_comparing_all_with_all_finds(
    drawn: list[tuple[int, list[str]]], similarity: float, per_example: int | None
) -> None:
    given = sorted(((n, ["w", *words]) for n, words in drawn), key=lambda pair: pair[0])
    kept: list[tuple[int, set[tuple[str, ...]]]] = []
    seen, wanted = set[tuple[int, str]](), list[str | None]()
    for number, words in given:
        width = min(3, len(words))
        runs = {tuple(words[k : k + width]) for k in range(len(words) - width + 1)}
        is_like = any(n != number and len(runs & other) >= similarity * len(runs | other) - 1e-12 for n, other in kept)
        if is_like or (number, " ".join(words)) in seen:
            wanted.append("near duplicate")
        elif per_example is not None and sum(n == number for n, _ in kept) >= per_example:
            wanted.append("surplus")
        else:
            wanted.append(None)
            kept.append((number, runs))
        seen.add((number, " ".join(words)))
    texts = [(number, " ".join(words)) for number, words in given]
    assert several(texts, near_duplicates=similarity, per_example=per_example) == wanted
