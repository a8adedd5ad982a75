"""Dotted paths to what stands in objects inside rows, where a column is named: tasks, recorded answers, messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from distill.errors import ConfigError
from distill.records import Example
from distill.tasks.answers import AnswerFormat
from distill.tasks.columns import with_columns
from distill.tasks.conversations import Conversations
from distill.tasks.tables import Table
from tests.tasks.conftest import answer_format
from tests.tasks.test_files import error_of, task, write
from tests.tasks.test_own_choices import choosing

ALL = {"num_test": 0, "num_validation": 0}
PATHS = {"question": "record.text", "answer": "record.labels.gold", "rationale": "record.why"}
RECORD = {"text": "Is it?", "labels": {"gold": "yes", "other": "no"}, "why": ["It is.", "It was."]}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.folder"])
def test_a_path_names_what_stands_in_an_object(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, [{"id": 1, "record": RECORD}])
    assert task(path, **PATHS, **ALL).splits().train == (Example("Is it?", "yes", "It is. It was."),)
    (example,) = task(path, **PATHS | {"question": "{id}. {record.text} ({{record.text}})"}, **ALL).splits().train
    assert example.question == "1. Is it? ({record.text})"


def test_several_answers_in_an_object_are_all_right(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", [{"question": "Where?", "answers": {"text": ["Paris", "In Paris"], "start": [0]}}]
    )
    (example,) = task(path, answer="answers.text", read=answer_format("line"), **ALL).splits().train
    assert example.right_answers == ("Paris", "In Paris")


def test_choices_of_each_row_may_stand_in_an_object(tmp_path: Path) -> None:
    row = {"question": "What?", "asked": {"choices": {"label": ["A", "B"], "text": ["a hat", "a shoe"]}}, "answer": "B"}
    built = choosing(write(tmp_path / "a.jsonl", [row]), column="asked.choices")
    assert built.splits().train == (Example("What?\nA. a hat\nB. a shoe", "B", choices=("A", "B")),)


def test_messages_may_stand_in_an_object(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "It is."}]
    table = Table("rows", {"line 1": {"data": {"turns": turns}}})
    read = AnswerFormat(kind="text", pattern=None, choices=[])
    examples = Conversations("data.turns", "all").examples(table, read, rationales=False)
    assert list(examples.values()) == [Example("Is it?", "It is.")]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_a_column_whose_own_name_has_dots_is_that_column(name: str, tmp_path: Path) -> None:
    rows = [{"record.text": f"Is {i}?", "labels.gold": "yes"} for i in range(2)]
    if name != "a.csv":
        rows = [row | {"record": {"text": "Was it?"}, "labels": {"gold": "no"}} for row in rows]  # type: ignore[dict-item]
    path = write(tmp_path / name, rows)
    examples = task(path, question="record.text", answer="labels.gold", **ALL).splits().train
    assert {(e.question, e.answer) for e in examples} == {("Is 0?", "yes"), ("Is 1?", "yes")}


def test_a_column_is_not_mixed_with_an_object_of_another_row(tmp_path: Path) -> None:
    rows = [{"question": "Was it?", "label": {"gold": "no"}}, {"question": "Is it?", "label.gold": "yes"}]
    examples = task(write(tmp_path / "a.jsonl", rows), answer="label.gold", **ALL).splits().train
    assert {(e.question, e.answer) for e in examples} == {("Is it?", "yes"), ("Was it?", None)}


def test_keys_of_objects_may_have_dots_themselves() -> None:
    rows: dict[str, dict[str, Any]] = {"line 1": {"a.b": {"c": 1}, "a": {"b.d": 2, "e": {"f.g": {"h": 3}}}}}
    selected = with_columns(Table("rows", rows), ["a.b.c", "a.b.d", "a.e.f.g.h"]).rows["line 1"]
    assert [selected[name] for name in ("a.b.c", "a.b.d", "a.e.f.g.h")] == [1, 2, 3]


def test_a_missing_or_null_object_is_an_empty_value(tmp_path: Path) -> None:
    labels: list[Any] = [{"gold": "yes"}, {"gold": None}, {}, None]
    rows = [{"question": f"Is {i}?", "record": {"labels": label}} for i, label in enumerate(labels)]
    rows += [{"question": "Is 4?", "record": None}, {"question": "Is 5?"}]
    examples = task(write(tmp_path / "a.jsonl", rows), answer="record.labels.gold", **ALL).splits().train
    assert {e.question: e.answer for e in examples} == {f"Is {i}?": "yes" if i == 0 else None for i in range(6)}


def test_a_value_that_is_no_object_is_refused_with_its_place(tmp_path: Path) -> None:
    rows = [{"record": RECORD}, {"record": "Is it?"}, {"record": {"text": "Was it?", "labels": ["yes"]}}]
    error = error_of(task(path := write(tmp_path / "a.jsonl", rows), **PATHS))
    assert (
        f"{path}: line 2: 'record' is 'Is it?', not an object with 'text'; line 3: 'record.labels' is ['yes']" in error
    )
    assert "expected objects in 'record.text', 'record.labels.gold', 'record.why'" in error


@pytest.mark.parametrize(
    ("question", "error"),
    [
        ("record.txt", "no column 'record.txt'; did you mean 'record.text'?; it has 'id', 'record', 'record.text', "),
        ("{record.text} {record.labels.glod}", "no column 'record.labels.glod'; did you mean 'record.labels.gold'?"),
        ("gold", "no column 'gold'; did you mean 'record.labels.gold'?; it has 'id', 'record', "),
        ("record.text.more", "no column 'record.text.more'"),
        ("record.why.0", "no column 'record.why.0'"),
        ("record.", "no column 'record.'"),
        (".text", "no column '.text'"),
        ("record.labels.__class__", "no column 'record.labels.__class__'"),
    ],
)
def test_a_missing_path_is_refused_with_what_there_is(question: str, error: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"id": 1, "record": RECORD}])
    message = error_of(task(path, **PATHS | {"question": question}))
    assert error in message
    listed = ["record.text", "record.labels", "record.labels.gold", "record.labels.other", "record.why"]
    assert message.endswith(", ".join(map(repr, ["id", "record", *listed])))


def test_all_missing_columns_are_listed_together_and_of_many_the_first(tmp_path: Path) -> None:
    row = {f"key {i}": {"deep": {"deeper": {}}} for i in range(100)}
    error = error_of(task(write(tmp_path / "a.jsonl", [row]), question="{a.b} {c}", answer="d.e"))
    assert all(f"no column {name!r}" in error for name in ("a.b", "c", "d.e"))
    assert "'key 12.deep.deeper', 'key 13' and 260 more" in error


def test_hostile_depth_and_dots_are_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "Q", "a": ' + '{"a": ' * 500 + "1" + "}" * 501)
    assert "no column 'a.b'" in error_of(task(tmp_path / "a.jsonl", answer="a.b"))
    assert "no column" in error_of(task(tmp_path / "a.jsonl", answer="." * 400))


def test_numbers_in_objects_and_lists_are_read_as_they_were_written(tmp_path: Path) -> None:
    score = pyarrow.struct({"value": pyarrow.float32(), "all": pyarrow.list_(pyarrow.float16())})
    column = pyarrow.array([{"value": 0.1, "all": [0.1, None, 3]}, None], score)
    parquet.write_table(pyarrow.table({"question": ["Q", "R"], "score": column}), tmp_path / "a.parquet")
    read = answer_format("number")
    by_path = {
        path: {
            e.question: e.right_answers
            for e in task(tmp_path / "a.parquet", answer=path, read=read, **ALL).splits().train
        }
        for path in ("score.value", "score.all")
    }
    assert by_path == {"score.value": {"Q": ("0.1",), "R": ()}, "score.all": {"Q": ("0.1", "3"), "R": ()}}


def test_class_labels_in_objects_and_lists_have_their_names(tmp_path: Path) -> None:
    label = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features(question=datasets.Value("string"), labels={"gold": label, "all": datasets.List(label)})
    labels = [{"gold": 1, "all": [1]}, {"gold": -1, "all": []}]
    rows = [{"question": f"Is {i}?", "labels": value} for i, value in enumerate(labels)]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    for path in ("labels.gold", "labels.all"):
        examples = task(tmp_path / "saved", answer=path, **ALL).splits().train
        assert {e.question: e.answer for e in examples} == {"Is 0?": "yes", "Is 1?": None}


def test_a_table_without_paths_is_the_same_table() -> None:
    table = Table("rows", {"line 1": {"a": 1}})
    assert with_columns(table, ["a"]) is table
    with pytest.raises(ConfigError, match="no column 'b'"):
        with_columns(table, ["a", "b"])
