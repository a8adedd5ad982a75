"""Kept rationales lead to the right answer; rejected ones have a single reason, the first in a fixed order."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from distill.annotation.rationales import count_by_reason, filter_samples
from distill.app import config as configuration
from distill.errors import ConfigError
from distill.records import Example
from distill.tasks.expressions import evaluate_expression
from tests.annotation.conftest import SOUND, as_written, conf_values, criteria, filtered, reason_for, reasons, sample
from tests.conftest import conf_names


def evaluated(answer: str) -> str:
    """The value of an answer where equal numbers agree."""
    return str(evaluate_expression(answer))


@pytest.mark.parametrize("name", conf_names("rationales"))
def test_every_file_of_conf_is_valid_and_builds(name: str) -> None:
    node = OmegaConf.create(conf_values(name))
    configuration.check(node)
    assert configuration.build(node) == criteria(name)
    with pytest.raises(ConfigError, match="min_word"):
        configuration.check(OmegaConf.merge(node, {"min_word": 3}))


@pytest.mark.parametrize("name", conf_names("rationales"))
def test_short_sound_texts_pass_every_filter_of_conf(name: str) -> None:
    texts = [
        ("The words warm and funny praise the film.", "positive"),
        ("Beautiful and moving are strong praise for the film.", "positive"),
        ("7 + 8 = 15.", "15"),
        ("7 + 8 = 15. 15 - 3 = 12.", "12"),
    ]
    for text, answer in texts:
        (rationale,) = filter_samples(
            [Example("Q", answer)], {Example("Q").id: [sample(answer, text)]}, {}, as_written, criteria(name)
        )
        assert (rationale.reason, rationale.compared_with, rationale.confidence) == (None, "gold", None)


def test_the_gold_answer_overrides_votes_and_the_direct_answer() -> None:
    rationales = filtered([sample("7"), sample("7"), sample("8")], gold="8", direct="7")
    assert [r.reason for r in rationales] == ["disagrees", "disagrees", None]
    assert {r.compared_with for r in rationales} == {"gold"}
    assert [r.confidence for r in rationales] == [2 / 3, 2 / 3, 1 / 3]


def test_a_rationale_may_lead_to_any_accepted_answer() -> None:
    example = Example("How many?", "8", accepted=("eight",))
    samples = {example.id: [sample("eight"), sample("8", SOUND + " Yes."), sample("nine")]}
    rationales = filter_samples([example], samples, {}, as_written, criteria("all"))
    assert [(r.reason, r.compared_with) for r in rationales] == [(None, "gold"), (None, "gold"), ("disagrees", "gold")]


def test_without_gold_the_majority_answer_is_right() -> None:
    rationales = filtered([sample("7"), sample("8"), sample("8", SOUND + " Yes."), sample("9")], direct="7")
    assert [r.reason for r in rationales] == ["outvoted", None, None, "outvoted"]
    assert {r.compared_with for r in rationales} == {"votes"}
    assert [r.confidence for r in rationales] == [0.25, 0.5, 0.5, 0.25]


@pytest.mark.parametrize("answers", ["78", "7788", "7878 ", "778899"])
def test_a_tie_has_no_winner(answers: str) -> None:
    samples = [sample(answer.strip() or None) for answer in answers]
    assert set(reasons(samples)) <= {"outvoted", "unreadable"}
    assert reasons([*samples, sample("8")]).count(None) == 1 or len(set(answers)) > 2


def test_a_tie_for_second_place_does_not_matter() -> None:
    assert reasons([sample("7"), sample("8"), sample("9"), sample("9", "Twice nine.")]) == [
        "outvoted",
        "outvoted",
        None,
        None,
    ]


def test_unreadable_and_truncated_samples_have_no_vote_but_count_in_the_share() -> None:
    rationales = filtered([sample(None), sample("4", is_truncated=True), sample("4", is_truncated=True), sample("42")])
    assert [r.reason for r in rationales] == ["unreadable", "truncated", "truncated", None]
    assert [r.confidence for r in rationales] == [None, 0.0, 0.0, 0.25]


def test_unreadable_samples_have_no_winner() -> None:
    assert reasons([sample(None), sample(None)], direct="7") == ["unreadable", "unreadable"]


def test_answers_of_equal_value_are_votes_for_the_same_answer() -> None:
    samples = [sample("(3 + 5)"), sample("9"), sample("(5 + 3)", "Five and three.")]
    assert reasons(samples, value=evaluated) == [None, "outvoted", None]
    assert set(reasons(samples, value=as_written)) == {"outvoted"}
    assert reasons(samples, gold="8", value=evaluated) == [None, "disagrees", None]
    assert reasons(samples[:1], direct="2 * 4", value=evaluated) == [None]


def test_a_single_sample_is_compared_with_the_direct_answer_or_has_no_reference() -> None:
    (rationale,) = filtered([sample("7")], direct="7")
    assert (rationale.reason, rationale.compared_with, rationale.confidence) == (None, "teacher", None)
    assert reasons([sample("8")], direct="7") == ["disagrees"]
    assert reasons([sample("7")]) == ["no reference"]
    assert filtered([], gold="7") == []
    assert filter_samples([Example("Not annotated.", "7")], {}, {}, as_written, criteria()) == []


def test_a_winner_needs_min_confidence_of_all_samples() -> None:
    samples = [sample("7"), sample("7", "Seven it must be."), sample("7", "Seven, I say."), sample(None), sample("8")]
    assert reasons(samples, min_confidence=0.6) == [None, None, None, "unreadable", "outvoted"]
    assert reasons(samples, min_confidence=0.61) == ["outvoted"] * 3 + ["unreadable", "outvoted"]
    assert reasons(samples, gold="7", min_confidence=1.0)[:3] == [None] * 3  # gold needs no votes
    close = [sample("7", f"The {k}th text.") for k in range(14)] + [
        sample("8")
    ] * 11  # 0.56 * 25 > 14 in floating point
    assert reasons(close, min_confidence=0.56)[:14] == [None] * 14


ALL_WRONG = "The answer is 42. " + "это неверно и 1 + 1 = 3. " * 4  # by every criterion


def test_the_first_of_several_reasons_is_reported() -> None:
    strict = {
        "arithmetic": True,
        "min_words": 60,
        "max_words": 61,
        "max_repetition": 0.1,
        "script": "LATIN",
        "leak": True,
    }
    assert reasons([sample(None, " ", is_truncated=True)], "42", **strict) == ["empty"]
    assert reasons([sample(None, ALL_WRONG, is_truncated=True)], "42", **strict) == ["truncated"]
    assert reasons([sample(None, ALL_WRONG)], "42", **strict) == ["unreadable"]
    assert reasons([sample("41", ALL_WRONG)], "42", **strict) == ["disagrees"]
    for changes, reason in [
        ({}, "wrong arithmetic"),
        ({"arithmetic": False}, "too short"),
        ({"min_words": 0, "max_words": 5}, "too long"),
        ({"max_words": None}, "repetitive"),
        ({"max_repetition": 1.0}, "foreign"),
        ({"script": None}, "leaks the answer"),
        ({"leak": False}, None),
    ]:
        strict |= changes
        assert reason_for(ALL_WRONG, **strict) == reason
    assert reasons([sample("42", ALL_WRONG)] * 2, "42", **strict, per_example=1) == [None, "near duplicate"]


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
def test_every_rationale_is_returned_once_and_in_order(drawn: list[Any], name: str) -> None:
    examples = [Example(f"Question {number}?", gold) for number, (gold, _, _) in enumerate(drawn)]
    samples = {
        example.id: [
            sample(answer, text, is_truncated=is_cut, key=f"{example.id} {k}") for k, (answer, text, is_cut) in s
        ]
        for example, (_, answers, _) in zip(examples, drawn, strict=True)
        for s in [list(enumerate(answers))]
    }
    direct = {e.id: answer for e, (_, _, answer) in zip(examples, drawn, strict=True) if answer is not None}
    rationales = filter_samples(examples, samples, direct, as_written, criteria(name))
    expected = [(example.id, annotation) for example in examples for annotation in samples[example.id]]
    assert [(r.example_id, r.annotation) for r in rationales] == expected
    counts = count_by_reason(rationales)
    assert sum(counts.values()) == len(rationales)
    assert counts["kept"] == sum(r.reason is None for r in rationales)
    assert all(counts[r.reason or "kept"] for r in rationales)


def test_counts_by_reason_in_descending_order() -> None:
    rationales = filtered([sample("8"), sample("7"), sample("8"), sample(None)], gold="7")
    assert count_by_reason(rationales) == {"kept": 1, "disagrees": 2, "unreadable": 1}
    assert count_by_reason([]) == {"kept": 0}


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
def test_invalid_settings_are_refused_by_name(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="rationales") as raised:
        criteria(**setting)
    assert len(raised.value.problems) == 1
    assert next(iter(setting)) in str(raised.value)


def test_all_invalid_settings_are_reported_together() -> None:
    with pytest.raises(ConfigError) as raised:
        criteria(min_confidence=-1.0, script="", per_example=0)
    assert len(raised.value.problems) == 3
