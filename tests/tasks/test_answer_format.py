"""Answer formats: reading answers of every kind, gold answers, values, refused settings."""

from __future__ import annotations

from typing import Any

import pytest

from distill.errors import AnswerError, ConfigError
from tests.tasks.conftest import answer_format

READ = [
    ("choice", " Yes, because it is.", "yes"),
    ("choice", "**no**\nQuestion: another", "no"),
    ("choice", "NOT SURE.", "not sure"),
    ("choice", "nothing", None),
    ("choice", "no-one", None),
    ("choice", "I say yes", None),
    ("number", "1,234.0 pens and 5", "1234"),
    ("number", "so $-5 or", "-5"),
    ("number", "10-3", "10"),
    ("number", "it is .50", "0.5"),
    ("number", "-0.0", "0"),
    ("number", "007.", "7"),
    ("number", "3,4", None),
    ("number", "none", None),
    ("last_number", "84 / 2 = 42.", "42"),
    ("last_number", "10-3", "3"),
    ("last_number", "2 and -7.25 °C", "-7.25"),
    ("expression", "( 84.0 / 2.0 )", "(84 / 2)"),
    ("expression", "(84/2) = 42 in all\n3 + 4", "(84 / 2)"),
    ("expression", "[10 − (3×06)].", "(10 - (3 * 6))"),
    ("expression", "-3 - -1,000.50", "-3 - -1000.5"),
    ("expression", "((1 + 2) * (-4))", "((1 + 2) * (-4))"),
    ("expression", "(84 / 2", None),
    ("expression", "(84 / 0)", None),
    ("expression", "2 ** 9", None),
    ("expression", "2 3", None),
    ("expression", "x + 2", None),
    ("expression", "", None),
    ("line", "\n the first \n the second", "the first"),
    ("line", " \n", None),
    ("text", "\n the first \n\n  the second\t\n", "the first \n\n  the second"),
    ("text", " \n\t", None),
    ("pattern", "so it goes #### 1,5 ", "1,5"),
    ("pattern", "so it goes", None),
    ("pattern", "#### ", None),
]


@pytest.mark.parametrize(("kind", "text", "answer"), READ)
def test_each_kind_reads_its_answers(kind: Any, text: str, answer: str | None) -> None:
    choices = ["no", "not sure", "yes"] if kind == "choice" else []
    answers = answer_format(kind, "####(.*)" if kind == "pattern" else None, choices)
    if answer is None:
        with pytest.raises(AnswerError):
            answers.read(text)
    else:
        assert answers.read(text) == answer
        assert kind == "pattern" or answers.read(answer) == answer


def test_the_default_kind_follows_from_pattern_and_choices() -> None:
    assert [answer_format(None, "(a)").kind, answer_format(choices=["a", "b"]).kind, answer_format().kind] == [
        "pattern",
        "choice",
        "line",
    ]
    assert answer_format(choices=[True, False, 3, 0.5]).choices == ("true", "false", "3", "0.5")


def test_answers_of_any_kind_must_be_among_the_choices() -> None:
    answers = answer_format("number", choices=[1, 2, 3])
    assert answers.read("2.0 stars") == "2"
    with pytest.raises(AnswerError, match="'4' is not one of 1, 2, 3"):
        answers.read("4")


@pytest.mark.parametrize(("kind", "text"), [("line", "a\nb"), ("expression", "(3 + 4) times 2"), ("choice", "no\nyes")])
def test_a_gold_answer_with_more_text_is_refused(kind: Any, text: str) -> None:
    with pytest.raises(AnswerError, match="has more text than the answer"):
        answer_format(kind, choices=["no", "yes"] if kind == "choice" else None).read_gold(text)


@pytest.mark.parametrize("text", ["10:30", "10^3", "10'000", "10’000", "10⁄3", "no‑one", "no‐one"])
def test_a_choice_is_not_read_from_the_beginning_of_a_longer_value_or_word(text: str) -> None:
    with pytest.raises(AnswerError, match="does not begin with any of"):
        answer_format(choices=["10", "no"]).read(text)


def test_outer_spaces_are_no_part_of_a_choice() -> None:
    answers = answer_format(choices=["yes ", "\tno", "not sure\N{NO-BREAK SPACE}"])
    assert answers.choices == ("yes", "no", "not sure")
    assert [answers.read_gold(choice) for choice in answers.choices] == ["yes", "no", "not sure"]
    with pytest.raises(ConfigError, match="differ only in case or outer spaces"):
        answer_format(choices=["yes", " Yes"])


@pytest.mark.parametrize(
    ("kind", "choice"),
    [("number", "1,000"), ("number", "1.0"), ("number", "many"), ("line", "a\nb"), ("pattern", "no")],
)
def test_a_choice_that_is_never_read_is_refused(kind: Any, choice: str) -> None:
    pattern = "####(.+)" if kind == "pattern" else None
    with pytest.raises(ConfigError, match=r"task\.choices: .* is not what task\.read\.kind=\w+ reads from it"):
        answer_format(kind, pattern, [choice])


def test_a_pattern_must_match_the_bare_answer_which_a_student_generates() -> None:
    assert answer_format("pattern", "(?s)(?:.*####)?(.+)").read_gold("Three\nand two. #### 5") == "5"
    with pytest.raises(AnswerError, match="does not read back unchanged"):
        answer_format("pattern", "####(.+)").read_gold("Three and two. #### 5")


LABELS = {  # a number label, and the number that it is; None: refused
    "1e-05": "0.00001",
    "1.5e6": "1500000",
    "-1.5E-3": "-0.0015",
    "+5": "5",
    "−5": "-5",
    "-€5": "-5",
    "£1,234.50": "1234.5",
    "5 apples": "5",
    "5%": "5",
    "50 km/h": "50",
    "12 m²": "12",
    "x = 5.": "5",
    "**5**": "5",
    "USD 5": "5",
    "1/2": None,
    "1⁄2": None,
    "1,5": None,
    "1.000,5": None,
    "1,234,56": None,
    "1_000": None,
    "1 000": None,
    "1\N{NARROW NO-BREAK SPACE}000": None,
    "1'000": None,
    "１２": None,
    "½": None,
    "5½": None,
    "2⁵": None,
    "10^3": None,
    "3:30": None,
    "1.5.2": None,
    "0x1F": None,
    "5 of 7": None,
    "10-3": None,
    "5 × 3": None,
    "5 million": None,
    "5M": None,
    "5 万": None,
    "5 and a half": None,
    "minus 5": None,
    "- 5": None,
    "<5": None,
    "1e5000": None,
    "1e99999999999999999999": None,
    "inf": None,
    "nan": None,
    "true": None,
    "It is 48/2 = 24, so #### 72": None,
}


@pytest.mark.parametrize("kind", ["number", "last_number"])
@pytest.mark.parametrize(("label", "number"), LABELS.items())
def test_a_number_label_is_read_whole_or_refused(kind: Any, label: str, number: str | None) -> None:
    answers = answer_format(kind)
    if number is None and not (kind == "last_number" and "####" in label):
        with pytest.raises(AnswerError):
            answers.read_gold(label)
    else:
        assert answers.read_gold(label) == (number or "72")


@pytest.mark.parametrize("text", ["1/2", "1,5", "1_000", "1 000", "3:30", "2⁵", "5½", "so 1.000,5 in all", "1e5000"])
def test_a_part_of_a_number_is_not_read_from_a_text_either(text: str) -> None:
    for kind in ("number", "last_number"):
        with pytest.raises(AnswerError):
            answer_format(kind).read(text)


@pytest.mark.parametrize("text", ["3x + 2", "1e5", "2⁵", "1,5", "3.4.5", "(3 + 4)x"])
def test_an_expression_that_goes_on_is_not_read(text: str) -> None:
    with pytest.raises(AnswerError):
        answer_format("expression").read(text)


@pytest.mark.parametrize("text", ["1/2", "yes/no", "yes-no", "1.5"])
def test_a_choice_that_goes_on_is_not_read(text: str) -> None:
    with pytest.raises(AnswerError):
        answer_format(choices=["1", "2", "yes", "no"]).read(text)


def test_a_label_of_several_lines_is_refused_with_the_setting_that_takes_it() -> None:
    label = "def f():\n    return 1"
    with pytest.raises(AnswerError, match=r"set task\.read\.kind=text"):
        answer_format("line").read_gold(label)
    assert answer_format("text").read_gold(label) == label


def test_expressions_with_equal_values_are_the_same_answer() -> None:
    answers = answer_format("expression")
    first, second, other = (answers.read(text) for text in ("( 3.0 + 5.0 )", "(5 + 3)", "(5 - 3)"))
    assert first != second
    assert answers.value(first) == answers.value(second) != answers.value(other)
    assert answers.value(answers.read("(1 / 3)")) == "1/3"
    assert answer_format("line").value("(5 + 3)") == "(5 + 3)"


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"kind": "pattern", "pattern": "(a"}, "not a valid regular expression"),
        ({"kind": "pattern", "pattern": "a"}, "has 0 groups, expected exactly 1"),
        ({"kind": "pattern", "pattern": "(a)(b)"}, "has 2 groups, expected exactly 1"),
        ({"kind": "pattern", "pattern": None}, "has 0 groups, expected exactly 1"),
        ({"kind": "number", "pattern": "(a)"}, "requires task.read.kind=pattern"),
        ({"kind": "choice"}, "needs choices"),
        ({"choices": ["Yes", "yes"]}, "differ only in case"),
        ({"choices": ["", "yes"]}, "must not be empty"),
    ],
)
def test_impossible_settings_of_an_answer_format_are_refused(settings: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        answer_format(**settings)


@pytest.mark.parametrize("label", ["one line", "the first\n\n  - an item\n  - 2 items\n", "e\u0301 and 7 #### 7"])
def test_a_text_is_its_own_gold_answer_with_all_its_lines(label: str) -> None:
    answers = answer_format("text")
    gold = answers.read_gold(label)
    assert gold.count("\n") == label.strip().count("\n")
    assert answers.read(f" {gold}\n") == answers.value(gold) == gold


def test_only_texts_without_choices_are_free_text() -> None:
    assert answer_format("text").is_free_text
    assert not answer_format("text", choices=["yes", "no"]).is_free_text
    assert not answer_format("line").is_free_text
