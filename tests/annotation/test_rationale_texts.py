"""Filters that read the text alone: length, repetition, script, leaks and near duplicates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.annotation.rationales import filter_samples, is_foreign, leaks, repetition
from distill.records import Example
from tests.annotation.conftest import as_written, criteria, reason_for, reasons, sample


def test_short_and_long_texts_are_rejected() -> None:
    settings = {"min_words": 3, "max_words": 5}
    texts = ["One two.", "One, two: three!", "One two three four five.", "One two three four five six."]
    assert [reason_for(text, **settings) for text in texts] == ["too short", None, None, "too long"]
    assert reason_for("84/2 = 42", **settings) is None
    assert reason_for("40 + 2 don't.", min_words=4) == "too short"
    assert reason_for("這部電影很好看", min_words=7, max_words=7) is None


def test_repeated_sentences_and_runs_of_words_are_repetitive() -> None:
    assert repetition("very " * 7) == 1 - 1 / 4
    assert repetition("It is good. It is good. It is bad. It is good.") == max(1 - 2 / 4, 1 - 6 / 9)
    assert repetition("Yes. Yes. No.") == pytest.approx(1 / 3)
    assert repetition("None of these words occurs again.") == repetition("") == 0
    assert reason_for("Yes. Yes. Yes. No.", max_repetition=0.49) == "repetitive"
    assert reason_for("Yes. Yes. Yes. No.", max_repetition=0.5) is None
    assert reason_for("It costs 3.5. It costs 3.7.", max_repetition=0.0) is None


def test_a_text_mostly_in_another_script_is_foreign() -> None:
    assert reason_for("Фильм хвалят, it is warm.", script="LATIN") == "foreign"
    assert reason_for("The film is called Зеркало.", script="latin") is None
    assert reason_for("84 / 2 = 42.", script="LATIN") is None
    assert not is_foreign("ab бв", "LATIN")
    assert not is_foreign("ab бв", "CYRILLIC")
    assert reason_for("這部電影很好看", script="CJK") is None
    assert reason_for("Ein schöner Film, naïve Ｗ.", script="LATIN") is None


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
def test_an_answer_instead_of_reasoning_is_a_leak(text: str, answer: str) -> None:
    assert leaks(text, answer)
    assert reason_for(text, answer, leak=True) == "leaks the answer"


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
def test_an_answer_after_reasoning_is_no_leak(text: str, answer: str) -> None:
    assert reason_for(text, answer, leak=True) is None


def test_equal_texts_of_an_example_are_kept_once() -> None:
    samples = [
        sample("8", "So it is."),
        sample("7", "So it is."),
        sample("7", "so  it is."),
        sample("7", "So it must be."),
    ]
    assert reasons(samples, gold="7") == ["disagrees", None, "near duplicate", None]


def test_at_most_per_example_rationales_are_kept() -> None:
    samples = [sample("8"), *(sample("7", f"For the {k}th time.") for k in range(4))]
    assert reasons(samples, gold="7", per_example=2) == ["disagrees", None, None, "surplus", "surplus"]
    assert reasons([*samples, samples[1]], gold="7", per_example=1)[1:] == [None, *["surplus"] * 3, "near duplicate"]


def reasons_for(texts: Sequence[tuple[int, str]], **settings: Any) -> list[str | None]:
    """Why texts of several examples were rejected; all led to the gold answer."""
    examples = [Example(f"Question {number}?", "7") for number in sorted({number for number, _ in texts})]
    samples = {e.id: [sample("7", t) for n, t in texts if e.question == f"Question {n}?"] for e in examples}
    return [r.reason for r in filter_samples(examples, samples, {}, as_written, criteria(**settings))]


def test_a_text_similar_to_one_of_another_example_is_a_near_duplicate() -> None:
    # Both have 5 runs of three words and share 4: similarity 4 / 6.
    texts = [(1, "a b c d e f g"), (2, "a b c d e f h")]
    assert reasons_for(texts, near_duplicates=4 / 6) == [None, "near duplicate"]
    assert reasons_for(texts, near_duplicates=0.67) == [None, None]
    assert reasons_for(texts) == [None, None]
    assert reasons_for([(1, texts[0][1]), (1, texts[1][1])], near_duplicates=0.1) == [None, None]  # of the same example
    assert reasons_for([(1, "Yes."), (2, "yes"), (3, "Yes yes.")], near_duplicates=1.0) == [
        None,
        "near duplicate",
        None,
    ]


def test_rejected_texts_have_no_near_duplicates() -> None:
    texts = [(1, "one two three four"), (1, "five six seven"), (2, "five six seven"), (3, "five six seven")]
    assert reasons_for(texts, near_duplicates=0.5, per_example=1) == [None, "surplus", None, "near duplicate"]


@given(
    st.lists(st.tuples(st.integers(0, 5), st.lists(st.sampled_from("abcd"), max_size=12)), max_size=20),
    st.sampled_from([0.1, 0.25, 1 / 3, 0.5, 0.55, 2 / 3, 0.7, 0.9, 1.0]),
    st.sampled_from([None, 1, 2]),
)
def test_near_duplicates_equal_those_of_comparing_all_pairs(
    drawn: list[tuple[int, list[str]]], similarity: float, per_example: int | None
) -> None:
    ordered = sorted(((n, ["w", *words]) for n, words in drawn), key=lambda pair: pair[0])
    kept: list[tuple[int, set[tuple[str, ...]]]] = []
    seen, expected = set[tuple[int, str]](), list[str | None]()
    for number, words in ordered:
        width = min(3, len(words))
        runs = {tuple(words[k : k + width]) for k in range(len(words) - width + 1)}
        is_similar = any(
            n != number and len(runs & other) >= similarity * len(runs | other) - 1e-12 for n, other in kept
        )
        if is_similar or (number, " ".join(words)) in seen:
            expected.append("near duplicate")
        elif per_example is not None and sum(n == number for n, _ in kept) >= per_example:
            expected.append("surplus")
        else:
            expected.append(None)
            kept.append((number, runs))
        seen.add((number, " ".join(words)))
    texts = [(number, " ".join(words)) for number, words in ordered]
    assert reasons_for(texts, near_duplicates=similarity, per_example=per_example) == expected
