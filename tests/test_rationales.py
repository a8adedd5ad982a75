"""A rationale that is kept led to the right answer and is sound; any other has one reason, always the same one."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import yaml
from conftest import conf_names
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from distill.annotation.rationales import (
    Checks,
    check,
    has_wrong_arithmetic,
    is_foreign,
    leaks,
    repetition,
    yield_by_reason,
)
from distill.app import config as configuration
from distill.app.config import CONF
from distill.errors import ConfigError
from distill.records import Annotation, CheckedRationale, Example
from distill.tasks.expressions import value_of

SOUND = "First 40 and then 2 more make 42."


@functools.cache
def values(name: str) -> dict[str, Any]:
    """What a file in conf/rationales/ says."""
    return yaml.safe_load((CONF / "rationales" / f"{name}.yaml").read_text())


def checks(name: str = "all", **settings: Any) -> Checks:
    """The checks of a file in conf/rationales/, some of them changed."""
    given = values(name) | settings
    assert given.pop("_target_") == "distill.annotation.rationales.Checks"
    return Checks(**given)


def said(answer: str | None, text: str = SOUND, *, cut_off: bool = False, key: str = "") -> Annotation:
    """What a teacher left for a request of a rationale."""
    return Annotation(key, {}, answer, text, is_truncated=cut_off)


def same(answer: str) -> str:
    """Answers are the same where they read the same."""
    return answer


def worked_out(answer: str) -> str:
    """Answers are the same where they come to the same."""
    return str(value_of(answer))


def judged(
    samples: Sequence[Annotation],
    gold: str | None = None,
    direct: str | None = None,
    value: Callable[[str], str] = same,
    **settings: Any,
) -> list[CheckedRationale]:
    """One example's rationales, checked."""
    example = Example("How many?", gold)
    answers = {} if direct is None else {example.id: direct}
    return check([example], {example.id: samples}, answers, value, checks(**settings))


def reasons(*given: Any, **settings: Any) -> list[str | None]:
    """Of one example's rationales."""
    return [one.reason for one in judged(*given, **settings)]


def alone(text: str, answer: str = "42", **settings: Any) -> str | None:
    """What is wrong with a text that led to the gold answer."""
    (reason,) = reasons([said(answer, text)], answer, **settings)
    return reason


@pytest.mark.parametrize("name", conf_names("rationales"))
def test_what_a_file_says_passes_the_check_of_a_configuration_and_is_built(name: str) -> None:
    node = OmegaConf.create(values(name))
    configuration.check(node)
    assert configuration.build(node) == checks(name)
    with pytest.raises(ConfigError, match="min_word"):
        configuration.check(OmegaConf.merge(node, {"min_word": 3}))


@pytest.mark.parametrize("name", conf_names("rationales"))
def test_short_sentences_that_are_right_pass_every_set_of_checks(name: str) -> None:
    given = [
        ("The words warm and funny praise the film.", "positive"),
        ("Beautiful and moving are strong praise for the film.", "positive"),
        ("7 + 8 = 15.", "15"),
        ("7 + 8 = 15. 15 - 3 = 12.", "12"),
    ]
    for text, answer in given:
        (one,) = check([Example("Q", answer)], {Example("Q").id: [said(answer, text)]}, {}, same, checks(name))
        assert (one.reason, one.compared_with, one.confidence) == (None, "gold", None)


# Right answers


def test_gold_beats_votes_and_the_direct_answer() -> None:
    found = judged([said("7"), said("7"), said("8")], gold="8", direct="7")
    assert [one.reason for one in found] == ["disagrees", "disagrees", None]
    assert {one.compared_with for one in found} == {"gold"}
    assert [one.confidence for one in found] == [2 / 3, 2 / 3, 1 / 3]


def test_without_gold_the_answer_with_the_most_votes_is_right() -> None:
    found = judged([said("7"), said("8"), said("8", SOUND + " Yes."), said("9")], direct="7")
    assert [one.reason for one in found] == ["outvoted", None, None, "outvoted"]
    assert {one.compared_with for one in found} == {"votes"}
    assert [one.confidence for one in found] == [0.25, 0.5, 0.5, 0.25]


@pytest.mark.parametrize("answers", ["78", "7788", "7878 ", "778899"])
def test_a_tie_has_no_majority(answers: str) -> None:
    given = [said(answer.strip() or None) for answer in answers]
    assert set(reasons(given)) <= {"outvoted", "unreadable"}
    assert reasons([*given, said("8")]).count(None) == 1 or len(set(answers)) > 2


def test_a_tie_for_the_second_place_decides_nothing() -> None:
    assert reasons([said("7"), said("8"), said("9"), said("9", "Twice nine.")]) == ["outvoted", "outvoted", None, None]


def test_what_cannot_be_read_or_was_cut_off_has_no_vote_and_still_counts() -> None:
    found = judged([said(None), said("4", cut_off=True), said("4", cut_off=True), said("42")])
    assert [one.reason for one in found] == ["unreadable", "truncated", "truncated", None]
    assert [one.confidence for one in found] == [None, 0.0, 0.0, 0.25]


def test_samples_of_which_none_can_be_read_elect_nothing() -> None:
    assert reasons([said(None), said(None)], direct="7") == ["unreadable", "unreadable"]


def test_equal_values_in_other_words_are_votes_for_the_same() -> None:
    given = [said("(3 + 5)"), said("9"), said("(5 + 3)", "Five and three.")]
    assert reasons(given, value=worked_out) == [None, "outvoted", None]
    assert set(reasons(given, value=same)) == {"outvoted"}
    assert reasons(given, gold="8", value=worked_out) == [None, "disagrees", None]
    assert reasons(given[:1], direct="2 * 4", value=worked_out) == [None]


def test_a_single_sample_is_compared_with_the_direct_answer_or_not_at_all() -> None:
    (one,) = judged([said("7")], direct="7")
    assert (one.reason, one.compared_with, one.confidence) == (None, "teacher", None)
    assert reasons([said("8")], direct="7") == ["disagrees"]
    assert judged([said("7")]) == []
    assert judged([], gold="7") == []
    assert check([Example("Not asked.", "7")], {}, {}, same, checks()) == []


def test_a_winner_needs_the_share_of_all_samples_that_is_asked_for() -> None:
    given = [said("7"), said("7", "Seven it must be."), said("7", "Seven, I say."), said(None), said("8")]
    assert reasons(given, min_confidence=0.6) == [None, None, None, "unreadable", "outvoted"]
    assert reasons(given, min_confidence=0.61) == ["outvoted"] * 3 + ["unreadable", "outvoted"]
    assert reasons(given, gold="7", min_confidence=1.0)[:3] == [None] * 3  # gold needs no votes
    close = [said("7", f"The {k}th text.") for k in range(14)] + [said("8")] * 11  # 0.56 * 25 > 14 in floating point
    assert reasons(close, min_confidence=0.56)[:14] == [None] * 14


# Texts


WRONG = [
    "84 / 2 = 41.",
    "9 * 2 = $19",
    "5 x 3 = 16",
    "5x3=16",
    "5 * 3 equals 16",
    "6 ÷ 2 × 4 = 11",
    "2 − 3 = 1",
    "1,000 + 2,500 = 3,600",
    "$1.50 + $2 = $3.60",
    "1.5 + 2 = 4",
    "10 / 3 = 3.34",
    "10 / 3 = 3",
    "20% * 50 = 11",
    "20% + 30% = 60%",
    "50 - 20% = 41",
    "1 / 3 = 34%",
    "(2 + 3) * 4 = 21",
    "He has 9 (5 + 3 = 9).",
    "[5 + 3 = 9]",
    "2 + 3 = 5 - 1 = 3",
    "2 + 3 = 6 - 2 = 4",
    "2 + 3 = 5 + 1",
    "5 + 3 = 8 and 8 - 2 = 7",
    "Total = 5 + 3 = 9",
    "x + 3 = 2 + 5 = 8",
    "**5 + 3 = 9**",
    "- 5 + 3 = 9",
    "1) 3 + 5 = 9",
    "<<5+3=9>>9",
    "First 5 + 3 = 8.\nThen 8 - 1 = 6.",
]
RIGHT = [
    "84 / 2 = 42.",
    "9 * 2 = $18",
    "5 x 3 = 15",
    "6 ÷ 2 × 4 = 12",
    "5 - -3 = 8",
    "-5 + 8 = 3",
    "1,000 + 2,500 = 3,500",
    "$1.50 + $2 = $3.50",
    "10 / 3 = 3.33",
    "2/3 = 0.67",
    "20% * 50 = 10",
    "20% + 30% = 50%",
    "50 - 20% = 40",
    "1 / 3 = 33.3%",
    "20/80 * 100 = 25%",
    "1/2 + 1/3 = 5/6",
    "(2 + 3) * 4 = 20",
    "((2 + 3) * 4 = 20)",
    "2 + 3 = 5 - 1 = 4",
    "2 + 3 = 4 + 1 = 5",
    "The total is 3 x $4 = $12.",
    "- 5 + 3 = 8",
    "<<5+3=8>>8",
]
NOT_JUDGED = [
    "x = 4",
    "3 feet = 1 yard",
    "5 apples + 3 apples = 8 apples",
    "5 apples + 3 * 2 = 11",
    "apples - 3 = 2 + 5 = 7",
    "2 + 3 = 4 + apples",
    "4 * (2 apples + 3) = 20",
    "2(3 + 4) = 14",
    "(2 + 3) (4 + 1) = 25",
    "f(3 + 5) = 64",
    "20% of 50 + 10 = 20",
    "half of 3 + 5 = 4",
    "5! - 3 + 1 = 118",
    "2^3 + 1 = 9",
    "2**3 + 1 = 9",
    "10:30 + 45 = 11:15",
    "3 1/2 + 1 = 4.5",
    "1,5 + 2 = 3,5",
    "7 / 2 = 3 remainder 1",
    "7 / 2 = 3 r 1",
    "7 / 2 = 3 and 1 is left",
    "5 * 1000 = 5 thousand",
    "5 + 3 != 9",
    "5 / 0 = 3",
    "9" * 300 + " + 1 = 2",
]


@pytest.mark.parametrize("text", WRONG)
def test_an_equation_that_is_false_is_found(text: str) -> None:
    assert has_wrong_arithmetic(text)
    assert alone(f"So it goes on. {text}" if "\n" not in text and text[0] != "-" else text, arithmetic=True) == (
        "wrong arithmetic"
    )


@pytest.mark.parametrize("text", [*RIGHT, *NOT_JUDGED])
def test_what_is_true_or_cannot_be_worked_out_is_not_called_wrong(text: str) -> None:
    assert not has_wrong_arithmetic(text)
    assert alone(text, arithmetic=True) is None


@given(
    st.integers(0, 999),
    st.sampled_from("+-*/"),
    st.integers(1, 999),
    st.integers(0, 3),
    st.integers(-3, 3),
    st.booleans(),
)
def test_an_equation_is_right_exactly_if_its_result_is_the_nearest_of_its_digits(
    a: int, sign: str, b: int, digits: int, off: int, in_dollars: bool
) -> None:
    exact = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign]
    result = round(exact, digits) + off * 10**-digits
    text = f"{a} {sign} {b} = {'$' if in_dollars else ''}{result:.{digits}f}".replace("$-", "-$")
    written = float(f"{result:.{digits}f}")
    gap = abs(written - exact)
    if digits and math.isclose(gap, 0.5 * 10**-digits, rel_tol=1e-6):
        return  # halves may be rounded either way
    assert has_wrong_arithmetic(text) == (gap > (0.5 * 10**-digits if digits else 1e-9))


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


# Other rationales


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


# The whole


ALL_WRONG = "The answer is 42. " + "это неверно и 1 + 1 = 3. " * 4  # in every way that a text can be


def test_of_several_reasons_the_first_in_order_is_told() -> None:
    strict = {
        "arithmetic": True,
        "min_words": 60,
        "max_words": 61,
        "max_repetition": 0.1,
        "script": "LATIN",
        "leak": True,
    }
    assert reasons([said(None, " ", cut_off=True)], "42", **strict) == ["empty"]
    assert reasons([said(None, ALL_WRONG, cut_off=True)], "42", **strict) == ["truncated"]
    assert reasons([said(None, ALL_WRONG)], "42", **strict) == ["unreadable"]
    assert reasons([said("41", ALL_WRONG)], "42", **strict) == ["disagrees"]
    for off, reason in [
        ({}, "wrong arithmetic"),
        ({"arithmetic": False}, "too short"),
        ({"min_words": 0, "max_words": 5}, "too long"),
        ({"max_words": None}, "repetitive"),
        ({"max_repetition": 1.0}, "foreign"),
        ({"script": None}, "leaks the answer"),
        ({"leak": False}, None),
    ]:
        strict |= off
        assert alone(ALL_WRONG, **strict) == reason
    assert reasons([said("42", ALL_WRONG)] * 2, "42", **strict, per_example=1) == [None, "near duplicate"]


@given(
    st.lists(
        st.tuples(
            st.sampled_from([None, "7", "8"]),
            st.lists(st.tuples(st.sampled_from([None, "7", "8"]), st.sampled_from(["", "So.", SOUND]), st.booleans())),
            st.sampled_from([None, "7"]),
        ),
        max_size=5,
    ),
    st.sampled_from(["all", "checked"]),
)
def test_every_rationale_that_can_be_compared_comes_back_once_and_in_order(drawn: list[Any], name: str) -> None:
    examples = [Example(f"Question {number}?", gold) for number, (gold, _, _) in enumerate(drawn)]
    samples = {
        example.id: [said(answer, text, cut_off=cut_off, key=f"{example.id} {k}") for k, (answer, text, cut_off) in s]
        for example, (_, given, _) in zip(examples, drawn, strict=True)
        for s in [list(enumerate(given))]
    }
    direct = {e.id: answer for e, (_, _, answer) in zip(examples, drawn, strict=True) if answer is not None}
    found = check(examples, samples, direct, same, checks(name))
    wanted = [
        (example.id, one)
        for example in examples
        for one in samples[example.id]
        if example.answer is not None or len(samples[example.id]) > 1 or example.id in direct
    ]
    assert [(one.example_id, one.annotation) for one in found] == wanted
    counts = yield_by_reason(found)
    assert sum(counts.values()) == len(found)
    assert counts["kept"] == sum(one.reason is None for one in found)
    assert all(counts[one.reason or "kept"] for one in found)


def test_a_yield_names_each_reason_with_its_number() -> None:
    found = judged([said("8"), said("7"), said("8"), said(None)], gold="7")
    assert yield_by_reason(found) == {"kept": 1, "disagrees": 2, "unreadable": 1}
    assert yield_by_reason([]) == {"kept": 0}


@pytest.mark.parametrize(
    "setting",
    [
        {"min_confidence": 1.1},
        {"min_words": -1},
        {"min_words": 5, "max_words": 4},
        {"max_repetition": -0.1},
        {"script": "LATTIN"},
        {"near_duplicates": 0.0},
        {"near_duplicates": 1.1},
        {"per_example": 0},
    ],
)
def test_checks_that_cannot_be_meant_are_refused_by_name(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="rationales") as raised:
        checks(**setting)
    assert len(raised.value.problems) == 1
    assert next(iter(setting)) in str(raised.value)


def test_all_that_is_wrong_with_checks_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        checks(min_confidence=-1.0, script="", per_example=0)
    assert len(raised.value.problems) == 3
