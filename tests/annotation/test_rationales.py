"""A rationale that is kept led to the right answer and is sound; any other has one reason, always the same one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from distill.annotation.rationales import check, yield_by_reason
from distill.app import config as configuration
from distill.errors import ConfigError
from distill.records import Example
from distill.tasks.expressions import value_of
from tests.annotation.conftest import SOUND, alone, checks, judged, reasons, said, same, values
from tests.conftest import conf_names


def worked_out(answer: str) -> str:
    """Answers are the same where they come to the same."""
    return str(value_of(answer))


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
