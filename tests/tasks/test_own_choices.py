"""Rows with choices of their own: every layout of the public sets, letters and texts, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from distill.app import config as configuration
from distill.errors import ConfigError
from distill.records import Example, RowCounts
from distill.tasks import readable_answer
from distill.tasks.answers import AnswerFormat
from distill.tasks.files import FileTask
from distill.tasks.options import Options
from tests.conftest import compose
from tests.tasks.test_files import error_of, task, write

TEXTS = ["a hat", "a shoe", "the rain"]
LAYOUTS: dict[str, Any] = {
    "texts": TEXTS,
    "labels and texts": {"label": ["A", "B", "C"], "text": TEXTS},
    "numbered": {"label": ["1", "2", "3"], "text": TEXTS},
    "pairs": [{"label": label, "text": text} for label, text in zip("ABC", TEXTS, strict=True)],
    "by letter": dict(zip("ABC", TEXTS, strict=True)),
    "by letter, with a null": dict(zip("ABCD", [*TEXTS, None], strict=True)),
    "labelled texts": [f"{letter}){text}" for letter, text in zip("ABC", TEXTS, strict=True)],
    "in brackets": [f"({letter}) {text}" for letter, text in zip("ABC", TEXTS, strict=True)],
}


def choosing(path: Path, *, pattern: str | None = None, **settings: Any) -> FileTask:
    """A task of rows with choices in the column `choices`."""
    defaults = {
        "column": "choices",
        "answer": "letter",
        "show": "\n{letter}. {text}",
        "gold": None,
        "invalid": None,
        "separator": None,
    }
    names = {"train": "train", "validation": "validation", "test": "test"} | settings.pop("split_names", {})
    options = Options(**defaults | settings)
    read = AnswerFormat(kind=None, pattern=pattern, choices="choices")
    return task(path, read=read, options=options, split_names=names, num_test=0, num_validation=0)


def examples_of(path: Path, rows: list[Any], **settings: Any) -> tuple[Example, ...]:
    return choosing(write(path, rows), **settings).splits().train


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_every_layout_gives_the_same_example(layout: str, suffix: str, tmp_path: Path) -> None:
    label = "2" if layout == "numbered" else "B"
    path = tmp_path / f"rows.{suffix}"
    (example,) = examples_of(path, [{"question": "What?", "choices": LAYOUTS[layout], "answer": label}])
    assert example == Example("What?\nA. a hat\nB. a shoe\nC. the rain", "B", choices=("A", "B", "C"))
    by_text = {"answer": "text", "show": ""}
    (example,) = examples_of(path, [{"question": "What?", "choices": LAYOUTS[layout], "answer": label}], **by_text)
    assert example == Example("What?", "a shoe", choices=tuple(TEXTS))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_choices_that_are_one_text_of_json_are_those_of_the_list(layout: str, suffix: str, tmp_path: Path) -> None:
    label = "2" if layout == "numbered" else "B"
    row = {"question": "What?", "choices": LAYOUTS[layout], "answer": label}
    written = row | {"choices": json.dumps(LAYOUTS[layout])}
    for separator in (None, ", "):
        texts = examples_of(tmp_path / f"a.{suffix}", [written], separator=separator)
        assert texts == examples_of(tmp_path / "b.jsonl", [row])


@pytest.mark.parametrize(
    ("text", "separator", "texts"),
    [
        ("a hat|a shoe|the rain", "|", TEXTS),
        (" a hat || a shoe || the rain ", "||", TEXTS),
        ("a hat\na shoe\nthe rain", "\n", TEXTS),
        ("A) a hat; B) a shoe; C) the rain", ";", TEXTS),
        ("[1]|[2]", "|", ["[1]", "[2]"]),
        ("0.10|0.1", "|", ["0.10", "0.1"]),
    ],
)
def test_choices_that_are_one_text_are_cut_at_the_separator(
    text: str, separator: str, texts: list[str], tmp_path: Path
) -> None:
    rows = [{"question": "What?", "choices": text, "answer": "A"}]
    (example,) = examples_of(tmp_path / "a.csv", rows, separator=separator, answer="text", show="")
    assert example.choices == tuple(texts)


@pytest.mark.parametrize("gold", ["B", "b", 1, "1", "a shoe", "A Shoe ", ["B"]])
def test_the_answer_is_a_label_an_index_or_a_text(gold: Any, tmp_path: Path) -> None:
    (example,) = examples_of(tmp_path / "a.jsonl", [{"question": "What?", "choices": TEXTS, "answer": gold}])
    assert example.answer == "B"


def test_several_right_answers_and_none(tmp_path: Path) -> None:
    rows = [
        {"question": "Which?", "choices": TEXTS, "answer": ["C", "A"]},
        {"question": "What?", "choices": TEXTS, "answer": ""},
    ]
    labelled, unlabelled = examples_of(tmp_path / "a.jsonl", rows)
    assert (labelled.answer, labelled.accepted) == ("C", ("A",))
    assert (unlabelled.answer, unlabelled.choices) == (None, ("A", "B", "C"))


def test_rows_may_have_unlike_numbers_of_choices(tmp_path: Path) -> None:
    rows = [{"question": f"Of {n}?", "choices": [f"a{k}" for k in range(n)], "answer": n - 1} for n in (2, 3, 5)]
    examples = examples_of(tmp_path / "a.jsonl", rows)
    assert {e.choices: e.answer for e in examples} == {("A", "B"): "B", ("A", "B", "C"): "C", tuple("ABCDE"): "E"}


def test_one_question_with_other_choices_is_another_example(tmp_path: Path) -> None:
    rows = [{"question": "What?", "choices": texts, "answer": "B"} for texts in (["a", "b"], ["a", "b", "c"])]
    assert len({e.id for e in examples_of(tmp_path / "a.jsonl", rows, answer="text", show="")}) == 2


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"choices": ["a"], "answer": "A"}, "has 1 choices; at least 2"),
        ({"choices": [], "answer": "A"}, "has 0 choices"),
        ({"choices": None, "answer": "A"}, "has no choices"),
        ({"choices": "a, b", "answer": "A"}, "'a, b' is not a JSON list of choices (Expecting value: "),
        ({"choices": " ", "answer": "A"}, "has no choices"),
        ({"choices": '["a", "b"', "answer": "A"}, "is not a JSON list of choices (Expecting ',' delimiter"),
        ({"choices": "['a', 'b']", "answer": "A"}, "write one, or set task.options.separator"),
        ({"choices": '{"a": 1, "a": 2}', "answer": "A"}, "the key 'a' appears twice"),
        ({"choices": "[" * 100_000, "answer": "A"}, "is not a JSON list of choices"),
        ({"choices": '"a"', "answer": "A"}, "is not a JSON list of choices (a single value)"),
        ({"choices": '["a"]', "answer": "A"}, "has 1 choices; at least 2"),
        ({"choices": '[["a", "b"], "c"]', "answer": "A"}, "is a list of 2 values"),
        ({"choices": ["a", " a"], "answer": "A"}, "must not be empty or repeated"),
        ({"choices": ["a", ""], "answer": "A"}, "must not be empty or repeated"),
        ({"choices": {"label": ["A", "A"], "text": ["a", "b"]}, "answer": "A"}, "the labels of its choices"),
        ({"choices": {"label": ["A"], "text": ["a", "b"]}, "answer": "A"}, "as many texts"),
        ({"choices": [{"label": "A"}, {"label": "B"}], "answer": "A"}, "a choice with label and text"),
        ({"choices": ["a", "b"], "answer": "C"}, "the answer 'C' is none of its choices, A: a, B: b"),
        ({"choices": ["a", "b"], "answer": 2}, "the answer '2' is none of its choices"),
        ({"choices": ["a", "b"], "answer": -1}, "the answer '-1' is none of its choices"),
        ({"choices": ["1", "2", "3"], "answer": 1}, "is the text of one choice and the label or index of another"),
        ({"choices": ["B", "A"], "answer": "A"}, "is the text of one choice and the label or index of another"),
        (
            {"choices": {"label": ["1", "2"], "text": ["a", "b"]}, "answer": "0"},
            "the answer '0' is none of its choices",
        ),
        ({"choices": [f"c{n}" for n in range(27)], "answer": 0}, "27 choices have no letters"),
    ],
)
def test_an_invalid_row_is_refused_with_its_place_or_dropped_and_counted(
    row: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    valid = {"question": "What?", "choices": TEXTS, "answer": "B"}
    path = write(tmp_path / "a.jsonl", [valid, {"question": "Bad?", **row}])
    message = error_of(choosing(path))
    assert f"{path}: line 2: " in message
    assert problem in message
    splits = choosing(path, invalid="drop").splits()
    assert [e.question[:5] for e in splits.train] == ["What?"]
    assert splits.counts["train"] == RowCounts(2, {"invalid choices": 1}, 1)


def test_what_the_column_of_answers_holds_can_be_set(tmp_path: Path) -> None:
    rows = [{"question": "Next?", "choices": ["1", "2", "3"], "answer": 1}]
    answers = [examples_of(tmp_path / "a.jsonl", rows, gold=gold)[0].answer for gold in ("label", "text")]
    assert answers == ["B", "A"]


def test_texts_that_cannot_be_told_apart_as_answers_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "Genes?", "choices": ["Aa", "aa"], "answer": "B"}])
    assert choosing(path).splits().train[0].answer == "B"
    assert "differ only in case" in error_of(choosing(path, answer="text"))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"show": ""}, "without which a letter means nothing"),
        ({"show": "\n{text}"}, "without which a letter means nothing"),
        ({"show": "\n{letter}"}, "without which a letter means nothing"),
        ({"show": "{letter} {txt}"}, "expected text with {letter} and {text}"),
        ({"show": "{letter", "answer": "text"}, "expected text with {letter} and {text}"),
        ({"show": "\\n{letter} {text}"}, "a backslash and a letter"),
        ({"separator": ""}, "task.options.separator='': expected at least one character"),
        ({"separator": r"\n"}, "a backslash and a letter"),
    ],
)
def test_an_invalid_setting_is_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as raised:
        choosing(Path("a.jsonl"), **settings)
    assert problem in str(raised.value)


@pytest.mark.parametrize(
    ("text", "answer"),
    [("B", "B"), (" (b) a shoe", "B"), ("B. a shoe", "B"), ("b\nC", "B"), ("D", None), ("Because", None), ("", None)],
)
def test_a_letter_is_read_among_the_letters_of_its_row(text: str, answer: str | None, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "What?", "choices": TEXTS, "answer": "B"}])
    assert readable(choosing(path), text) == answer


def test_a_text_is_read_among_the_texts_of_its_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "What?", "choices": ["good", "good but slow"], "answer": 0}])
    built = choosing(path, answer="text")
    read = {text: readable(built, text) for text in ("Good.", "good but slow, I think", "goods", "bad")}
    assert list(read.values()) == ["good", "good but slow", None, None]


def test_a_pattern_reads_the_letter_behind_reasoning(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "What?", "choices": TEXTS, "answer": "B"}])
    built = choosing(path, pattern=r"(?:.*answer is )?\(?([A-Z])\b")
    assert readable(built, "Rain is wet, so the answer is (C).") == "C"
    assert readable(built, "the answer is D") is None


def readable(built: FileTask, text: str) -> str | None:
    return readable_answer(built, text, built.splits().train[0])


HUB_ROWS: dict[str, list[dict[str, Any]]] = {  # in the columns of the data sets on the hub
    "commonsense_qa": [
        {
            "id": f"{n}",
            "question": question,
            "question_concept": "tool",
            "choices": {"label": list("ABCDE"), "text": ["cow", "saw", "sea", "sky", "sand"]},
            "answerKey": "B",
        }
        for n, question in enumerate(["A tool?", "Another?"])
    ],
    "arc": [
        {
            "id": "M1",
            "question": "A tool?",
            "choices": {"text": ["cow", "saw", "sea"], "label": list("ABC")},
            "answerKey": "B",
        },
        {
            "id": "M2",
            "question": "Another?",
            "choices": {"text": ["1", "2", "3", "4"], "label": list("1234")},
            "answerKey": "3",
        },
    ],
    "mmlu": [
        {"question": "A tool?", "subject": "tools", "choices": ["cow", "saw", "sea", "sky"], "answer": 1},
        {"question": "Another?", "subject": "sums", "choices": ["0", "1", "2", "3"], "answer": 2},
    ],
    "aqua": [
        {"question": "A tool?", "options": ["A)cow", "B)saw", "C)sea"], "rationale": "It saws.", "correct": "B"},
        {"question": "Another?", "options": ["A)1", "B)2", "C)3 : 4"], "rationale": "It is 3 : 4.", "correct": "C"},
        {"question": "Twice?", "options": ["A)1", "B)1", "C)2"], "rationale": "It is 2.", "correct": "C"},
    ],
}
SHOWN = {"commonsense_qa": "\nD. sky\nE. sand", "mmlu": "\nD. sky"}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", HUB_ROWS)
def test_rows_of_public_sets_are_read_from_disk(name: str, suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"rows.{suffix}", HUB_ROWS[name])
    sizes = ["task.examples.num_test=0", "task.examples.num_validation=0"]
    config = compose(f"task={name}", f"task.path={path}", *sizes)
    configuration.check(config)
    built = configuration.build(config.task.examples)
    first, second = sorted(built.splits().train, key=lambda example: example.question)
    assert first.question == f"A tool?\nA. cow\nB. saw\nC. sea{SHOWN.get(name, '')}"
    assert first.answer == "B"
    assert second.answer == {"commonsense_qa": "B"}.get(name, "C")
    assert len(first.choices) == first.question.count("\n")
    assert sum(built.splits().counts["train"].lost.values()) == len(HUB_ROWS[name]) - 2
    assert all(shot.answer in shot.choices and shot.rationale for shot in built.shots())
    assert {len(shot.choices) for shot in built.shots()} <= {3, 4, 5}


def test_the_splits_of_a_data_set_have_the_names_that_it_gives_them(tmp_path: Path) -> None:
    rows = HUB_ROWS["commonsense_qa"]
    tables = {
        "train": [row | {"question": f"Train {n}?"} for n, row in enumerate(rows * 4)],
        "validation": [rows[0]],
        "test": [rows[1] | {"answerKey": ""}],
    }
    saved = {name: datasets.Dataset.from_list(part) for name, part in tables.items()}
    datasets.DatasetDict(saved).save_to_disk(str(tmp_path / "saved"))
    config = compose("task=commonsense_qa", f"task.path={tmp_path / 'saved'}", "task.examples.num_validation=2")
    splits = configuration.build(config.task.examples).splits()
    assert [example.question[:7] for example in splits.test] == ["A tool?"]
    assert len(splits.validation) == 2
    assert all(example.question.startswith("Train") for example in (*splits.train, *splits.validation))
    config = compose("task=mmlu", f"task.path={tmp_path / 'saved'}")
    with pytest.raises(ConfigError, match="has no split 'auxiliary_train'; it has train, validation, test"):
        configuration.build(config.task.examples).splits()
    config = compose("task=jsonl", f"task.path={tmp_path / 'saved'}", "+task.splits.dev=test")
    with pytest.raises(ConfigError, match=r"task\.splits: dev"):
        configuration.build(config.task.examples)
