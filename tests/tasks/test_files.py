"""Tasks from files: all formats give the same examples, and every mistake is reported with its place."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from distill.app import config as configuration
from distill.errors import ConfigError
from distill.records import RowCounts
from distill.tasks import tables
from distill.tasks.files import Columns, FileTask
from tests.conftest import compose
from tests.tasks.conftest import answer_format

ROWS = [
    {"question": f"Is {i}, said “Jo”,\nmore than 20?", "answer": "yes" if i > 20 else "no", "why": f'{i} "and" 20'}
    for i in range(40)
]
SHOT = {"question": "Is it?", "rationale": "It is so.", "answer": "yes"}


def task(path: Path | str, **settings: Any) -> FileTask:
    """A yes/no task from a file with the default column names."""
    defaults = dict.fromkeys(("test_path", "validation_path", "num_labelled", "num_unlabelled"))
    defaults |= dict.fromkeys(("num_validation", "num_test"))
    sizes = {"root": str(Path(path).parent / "root"), "folds": None, "fold": 0, "split_seed": 0}
    columns = {"question": "question", "answer": "answer", "rationale": None, "options": None}
    rows = Columns(**{name: settings.pop(name, column) for name, column in columns.items()})
    arguments = {
        "path": str(path),
        "rows": rows,
        "read": answer_format(choices=["yes", "no"]),
        "shots": [],
        "split_names": None,
        "conflicts": None,
    } | settings
    return FileTask(**{**defaults, **sizes, **arguments})


def free_texts(path: Path, **settings: Any) -> FileTask:
    return task(path, read=answer_format("text"), **settings)


def test_free_texts_without_any_gold_text_are_held_out_too(tmp_path: Path) -> None:
    rows = [{"question": f"Tell me about {k}.", "answer": ""} for k in range(40)]
    splits = free_texts(write(tmp_path / "prompts.jsonl", rows), num_test=7).splits()
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [29, 4, 7]
    assert all(example.answer is None for part in (splits.train, splits.validation, splits.test) for example in part)
    assert len({example.id for part in (splits.train, splits.validation, splits.test) for example in part}) == 40


def test_labelled_free_texts_are_held_out_first(tmp_path: Path) -> None:
    rows = [{"question": f"Tell me about {k}.", "answer": "It is." if k < 10 else ""} for k in range(40)]
    splits = free_texts(write(tmp_path / "some.jsonl", rows), num_test=3, num_validation=2).splits()
    assert all(example.answer for example in (*splits.test, *splits.validation))
    assert sum(example.answer is not None for example in splits.train) == 5
    assert len(splits.train) == 35


def test_a_test_file_of_free_texts_has_gold_texts_in_all_rows_or_in_none(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [{"question": f"Tell me about {k}.", "answer": ""} for k in range(20)])
    prompts = [{"question": f"And about {k}?", "answer": ""} for k in range(3)]
    test = write(tmp_path / "test.jsonl", prompts)
    assert len(free_texts(train, test_path=str(test)).splits().test) == 3
    mixed = write(tmp_path / "mixed.jsonl", [*prompts, {"question": "And me?", "answer": "It is."}])
    with pytest.raises(ConfigError, match="3 test rows have no 'answer'"):
        free_texts(train, test_path=str(mixed)).splits()
    with pytest.raises(ConfigError, match="3 test rows have no 'answer'"):
        task(train, test_path=str(test)).splits()


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows in the format of the path's suffix."""
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if path.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


def jsonl(tmp_path: Path, *rows: Any) -> Path:
    return write(tmp_path / "rows.jsonl", list(rows))


def error_of(task: FileTask) -> str:
    with pytest.raises(ConfigError) as raised:
        task.splits()
    return str(raised.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.folder"])
def test_every_format_gives_the_same_examples_and_writes_no_file(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, ROWS)
    before = sorted(tmp_path.rglob("*"))
    splits = task(path, rationale="why").splits()
    assert sorted(tmp_path.rglob("*")) == before
    examples = {(e.question, e.answer, e.rationale) for e in splits.train}
    assert examples <= {(row["question"], row["answer"], row["why"]) for row in ROWS}
    assert (len(examples), len(splits.validation), len(splits.test)) == (32, 4, 4)
    assert splits == task(write(tmp_path / "other.jsonl", ROWS[::-1]), rationale="why").splits()


def test_a_saved_dataset_keeps_its_splits_and_label_names(tmp_path: Path) -> None:
    features = datasets.Features(question=datasets.Value("string"), answer=datasets.ClassLabel(names=["no", "yes"]))

    def part(name: str, labels: list[int]) -> datasets.Dataset:
        rows = [{"question": f"{name} {i}", "answer": label} for i, label in enumerate(labels)]
        return datasets.Dataset.from_list(rows, features=features)

    parts = {"train": part("train", [0, 1, -1]), "validation": part("validation", [1]), "test": part("test", [0, 0])}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    splits = task(tmp_path / "saved").splits()
    assert {(e.question, e.answer) for e in splits.train} == {("train 0", "no"), ("train 1", "yes"), ("train 2", None)}
    assert [(e.question, e.answer) for e in splits.validation] == [("validation 0", "yes")]
    assert {e.question for e in splits.test} == {"test 0", "test 1"}


def test_a_separate_test_file_is_used_whole_and_excluded_from_training(tmp_path: Path) -> None:
    path, test = write(tmp_path / "train.csv", ROWS[:30]), write(tmp_path / "test.jsonl", ROWS[25:])
    splits = task(path, test_path=str(test), num_validation=5, num_labelled=8).splits()
    assert {e.question for e in splits.test} == {row["question"] for row in ROWS[25:]}
    assert (len(splits.train), len(splits.validation)) == (20, 5)
    assert [e.answer is None for e in splits.train] == [False] * 8 + [True] * 12
    assert splits.counts == {
        "train": RowCounts(25, {"in another split": 5}, 20),
        "validation": RowCounts(5, {}, 5),
        "test": RowCounts(15, {}, 15),
    }
    assert len(task(path, test_path=str(test), num_test=3).splits().test) == 3


def test_a_test_file_needs_no_column_of_rationales(tmp_path: Path) -> None:
    train = jsonl(tmp_path, *({"question": f"Q{k}", "answer": "yes", "why": "So it is."} for k in range(4)))
    held_out = write(tmp_path / "test.jsonl", [{"question": "T", "answer": "no"}])
    splits = task(train, rationale="why", test_path=str(held_out), num_validation=1).splits()
    assert [example.rationale for example in splits.test] == [None]
    assert {example.rationale for example in splits.train} == {"So it is."}


def test_another_split_seed_holds_out_other_examples(tmp_path: Path) -> None:
    path = jsonl(tmp_path, *({"question": f"Q{k}", "answer": "yes"} for k in range(40)))
    first, same, other = (task(path, split_seed=seed, num_test=10).splits().test for seed in (0, 0, 1))
    assert first == same
    assert set(first) != set(other)


def test_held_out_examples_depend_on_content_and_not_on_row_order(tmp_path: Path) -> None:
    sizes = {"num_labelled": 10, "num_unlabelled": 5, "num_validation": 5, "num_test": 5}
    first = task(write(tmp_path / "a.csv", ROWS), **sizes).splits()
    assert task(write(tmp_path / "b.jsonl", [*ROWS[20:], *ROWS[:20]]), **sizes).splits() == first
    assert task(tmp_path / "a.csv", **sizes, split_seed=1).splits().test != first.test
    assert first.test != tuple(sorted(first.test, key=lambda e: e.question))


def test_a_row_without_answer_is_unlabelled_and_never_held_out(tmp_path: Path) -> None:
    unlabelled_rows = [
        {"question": f"What of {i}?", "answer": answer, "why": "So."} for i, answer in enumerate(["", None, " \n"])
    ]
    splits = task(jsonl(tmp_path, *unlabelled_rows, {"question": "And?"}, *ROWS), rationale="why").splits()
    unlabelled = [e for e in splits.train if e.answer is None]
    assert {e.question for e in unlabelled} == {"What of 0?", "What of 1?", "What of 2?", "And?"}
    assert splits.train[-4:] == tuple(unlabelled)
    assert all(e.rationale is None for e in unlabelled)
    test = write(tmp_path / "test.jsonl", [ROWS[0], *unlabelled_rows])
    assert "3 test rows have no 'answer'" in error_of(task(tmp_path / "rows.jsonl", test_path=str(test)))


def test_a_repeated_question_counts_once_and_keeps_its_label(tmp_path: Path) -> None:
    repeated = {"question": f" {ROWS[30]['question']}\n", "answer": None}
    splits = task(jsonl(tmp_path, repeated, *ROWS), num_test=0, num_validation=0).splits()
    assert len(splits.train) == len(ROWS)
    assert all(e.answer for e in splits.train)
    assert splits.counts["train"] == RowCounts(41, {"repeated": 1}, 40)


@pytest.mark.parametrize(
    ("value", "text"),
    [(True, "true"), (False, "false"), (42.0, "42"), (7, "7"), (0.5, "0.5"), (-3.0, "-3"), (["a"], "a")],
)
def test_other_values_are_converted_to_text(value: Any, text: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"question": "Q", "answer": value})
    (example,) = task(path, read=answer_format("line"), num_test=0, num_validation=0).splits().train
    assert example.answer == text


@pytest.mark.parametrize("value", [None, math.nan])
def test_a_null_in_parquet_is_a_missing_label(value: float | None, tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [{"question": "Q", "answer": value}, {"question": "R", "answer": 1.0}])
    splits = task(path, read=answer_format("number"), num_test=0, num_validation=0).splits()
    assert {(e.question, e.answer) for e in splits.train} == {("Q", None), ("R", "1")}


def test_control_characters_in_data_are_kept(tmp_path: Path) -> None:
    odd = "a\x00b\x1b[31m\x85\u2028{not a column}\u200b"
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet"):
        path = write(tmp_path / name, [{"question": odd, "answer": odd}])
        (example,) = task(path, read=answer_format("line"), num_test=0, num_validation=0).splits().train
        assert (example.question, example.answer) == (odd, odd)


def test_a_byte_order_mark_is_not_part_of_the_first_column_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfquestion,answer\r\nIs it?,yes\r\n")
    assert len(task(tmp_path / "a.csv").splits().train) == 1


def test_a_question_can_be_a_template_of_columns(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"body": "It {rains}.", "title": "A", "answer": "yes"})
    (example,) = task(path, question="{title}: {body} {{Wet}}?").splits().train
    assert example.question == "A: It {rains}. {Wet}?"


@pytest.mark.parametrize(
    ("question", "error"),
    [
        ("qestion", "has no column 'qestion'; did you mean 'question'?; it has 'question', 'answer', 'why'"),
        ("{question} {body}", "has no column 'body'"),
        ("{question.__class__}", "has no column 'question.__class__'"),
        ("{question[0]}", "has no column 'question[0]'"),
        ("{}", "has no column ''"),
        ("{question!r}", "expected only columns in braces"),
        ("{question:>9}", "expected only columns in braces"),
        ("{question", "expected text and {columns}"),
    ],
)
def test_a_template_with_anything_but_columns_is_refused(question: str, error: str, tmp_path: Path) -> None:
    assert error in error_of(task(jsonl(tmp_path, *ROWS), question=question))


def test_missing_columns_are_listed_together(tmp_path: Path) -> None:
    error = error_of(task(jsonl(tmp_path, *ROWS), answer="anwser", rationale="because"))
    assert "no column 'anwser'" in error
    assert "did you mean 'answer'?" in error
    assert "no column 'because'" in error


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("a.jsonl", b'{"question": "Q"}\n\n{"question"\n[1]\n', "line 3: Expecting ':'"),
        (
            "a.jsonl",
            b'{"question": "Q"}\n\n{"question"\n[1]\n',
            "line 4: [1] is not an object; expected one JSON object",
        ),
        ("a.jsonl", b"[" * 100_000, "line 1: "),
        (
            "a.jsonl",
            b'{"question": "Q"}\n{"question": "\xff"}',
            "line 2: invalid start byte at byte 14; expected UTF-8",
        ),
        ("a.jsonl", b'{"question": "\\ud800", "answer": "yes"}', "line 1: 'utf-8' codec can't encode"),
        ("a.jsonl", b'{"question": " ", "answer": "yes"}', "line 1: question is empty"),
        ("a.jsonl", b'{"question": {"a": 1}, "answer": "yes"}', "line 1: {'a': 1} is a dict, expected a text"),
        ("a.jsonl", b'{"question": "Q", "answer": "maybe"}', "line 1: 'maybe' does not begin with any of yes, no"),
        (
            "a.jsonl",
            b'{"question": "Q", "answer": "yes and no"}',
            "line 1: 'yes and no' has more text than the answer 'yes'",
        ),
        ("a.jsonl", b"", "it has no rows"),
        ("a.json", b'[{"question": "Q"}, 3]', "3 is not an object; expected an array of JSON objects"),
        ("a.json", b'[{"question": "Q"},\n}', "line 2 column 1"),
        (
            "a.csv",
            b"question,answer\nQ,yes\nR\nS,no,no",
            "line 3: 1 fields, but the first line has 2; line 4: 3 fields",
        ),
        ("a.csv", b'question,answer\nQ,yes\n"R,no', "line 3: unexpected end of data"),
        ("a.csv", b"question,answer\n\xe4,yes", "line 2: invalid continuation byte"),
        ("a.parquet", b"PAR2", "is not readable as Parquet"),
        ("a.txt", b"Q", "expected a file that ends in .jsonl, .json, .csv, .tsv, .parquet"),
    ],
)
def test_a_broken_file_is_refused_with_its_name_and_place(
    name: str, content: bytes, error: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    message = error_of(task(tmp_path / name))
    assert message.startswith(str(tmp_path / name))
    assert error in message


@pytest.mark.parametrize("name", ["a.parquet", "a.folder"])
def test_a_date_that_python_cannot_hold_is_one_clear_error(name: str, tmp_path: Path) -> None:
    table = pyarrow.table({"question": ["Q"], "answer": pyarrow.array([2**52], pyarrow.timestamp("ms"))})
    path = tmp_path / name
    if name == "a.parquet":
        parquet.write_table(table, path)
    else:
        datasets.Dataset(table).save_to_disk(str(path))
    error = error_of(task(path))
    assert error.startswith(str(path))
    assert "out of range" in error


def test_only_the_first_problems_are_shown_and_the_others_counted(tmp_path: Path) -> None:
    rows = [{"question": f"Q{i}", "answer": f"perhaps{i}"} for i in range(9)]
    error = error_of(task(jsonl(tmp_path, *rows)))
    assert [f"perhaps{i}" in error for i in range(9)] == [True] * 3 + [False] * 6
    assert "and 6 more" in error


def test_a_missing_file_or_wrong_folder_is_refused(tmp_path: Path) -> None:
    assert "does not exist; expected a file, a folder, " in error_of(task(tmp_path / "none.jsonl"))
    (tmp_path / "empty").mkdir()
    assert "was not saved by datasets.save_to_disk" in error_of(task(tmp_path / "empty"))


def test_an_unavailable_hub_dataset_is_one_clear_error(tmp_path: Path) -> None:
    assert datasets.config.HF_HUB_OFFLINE  # as tests/conftest.py sets it
    with pytest.raises(ConfigError, match=r"^nobody/nothing is not a local file or folder, and could not be loaded"):
        tables.open_tables("nobody/nothing", tmp_path)


def test_importing_the_module_loads_neither_datasets_nor_pandas() -> None:
    code = "import sys, distill.tasks.files; assert not {'datasets', 'pandas', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize(
    ("sizes", "error"),
    [
        ({"num_test": 41}, "num_test=41: "),
        ({"num_test": 41}, "has 40 distinct examples left for it"),
        ({"num_test": 30, "num_validation": 11}, "num_validation=11: "),
        ({"num_test": 10, "num_validation": 10, "num_labelled": 21}, "has 20 distinct examples left"),
        ({"num_test": 10, "num_validation": 10, "num_labelled": 15, "num_unlabelled": 6}, "has 5 distinct examples"),
        ({"num_test": 20, "num_validation": 20}, "no examples are left for training"),
    ],
)
def test_too_few_rows_are_refused_with_numbers(sizes: dict[str, int], error: str, tmp_path: Path) -> None:
    assert error in error_of(task(jsonl(tmp_path, *ROWS), **sizes))


def test_a_negative_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_test=-1"):
        task(tmp_path / "a.jsonl", num_test=-1)


def test_demonstrations_are_read_like_data_and_must_not_be_in_it(tmp_path: Path) -> None:
    path = jsonl(tmp_path, *ROWS)
    (read_shot,) = task(path, shots=[SHOT | {"answer": "Yes."}]).shots()
    assert (read_shot.question, read_shot.rationale, read_shot.answer) == ("Is it?", "It is so.", "yes")
    assert "is also a question of the data" in error_of(task(path, shots=[SHOT | {"question": ROWS[3]["question"]}]))
    for shot in ({"question": "Q"}, SHOT | {"anwser": "no"}, SHOT | {"answer": "perhaps"}):
        with pytest.raises(ConfigError, match=r"task\.examples\.shots"):
            task(path, shots=[shot])


def test_the_short_keys_of_the_task_reach_its_examples(tmp_path: Path) -> None:
    rows = [{"text": f"Text {i}", "label": i % 2 == 0} for i in range(20)]
    short = ["task.question=text", "task.answer=label", "task.choices=[true,false]", "task.name=mine"]
    config = compose("task=jsonl", f"task.path={jsonl(tmp_path, *rows)}", *short)
    configuration.check(config)
    built = configuration.build(config.task.examples)
    assert built.choices == ("true", "false")
    splits = built.splits()
    assert {e.question for part in (splits.train, splits.validation, splits.test) for e in part} == {
        row["text"] for row in rows
    }
    assert all(e.answer == str(int(e.question.split()[1]) % 2 == 0).lower() for e in splits.train)


def test_paths_into_objects_and_a_separator_reach_the_examples_of_the_task(tmp_path: Path) -> None:
    rows = [{"record": {"text": f"Text {i}?"}, "own": "a | b", "label": "b"} for i in range(20)]
    keys = ["task.question=record.text", "task.choices=own", "task.answer=label", "task.options.separator=' | '"]
    config = compose("task=jsonl", f"task.path={jsonl(tmp_path, *rows)}", *keys)
    configuration.check(config)
    assert configuration.build(config.task.examples).splits().test[0].question.endswith("?\nA. a\nB. b")


def test_the_folds_of_a_cross_validation_hold_out_each_example_once(tmp_path: Path) -> None:
    path = write(tmp_path / "all.jsonl", [*ROWS, {**ROWS[0], "question": "Is it unlabelled?", "answer": ""}])
    parts = [task(path, folds=3, fold=fold, num_validation=5).splits() for fold in range(3)]
    held_out = [example.question for splits in parts for example in splits.test]
    assert sorted(held_out) == sorted(row["question"] for row in ROWS)
    assert [len(splits.test) for splits in parts] == [13, 13, 14]
    for splits in parts:
        rest = {example.question for example in (*splits.train, *splits.validation)}
        assert rest == {row["question"] for row in ROWS} - {e.question for e in splits.test} | {"Is it unlabelled?"}
        assert len(splits.validation) == 5
        assert splits.counts["test"].kept == len(splits.test)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"folds": 1, "fold": 0}, "folds=1 and fold=0: expected at least 2 folds"),
        ({"folds": 3, "fold": 3}, "folds=3 and fold=3: expected at least 2 folds"),
        ({"folds": 3, "num_test": 5}, "task.examples.num_test exclude"),
        ({"folds": 41, "num_validation": 0}, "has 40 labelled examples only"),
    ],
)
def test_folds_that_cannot_be_are_refused(settings: dict[str, int], error: str, tmp_path: Path) -> None:
    path = write(tmp_path / "all.jsonl", ROWS)
    with pytest.raises(ConfigError, match=error):
        task(path, **settings).splits()


def test_folds_of_data_with_a_test_split_are_refused(tmp_path: Path) -> None:
    for name in ("train", "test"):
        write(tmp_path / f"{name}.jsonl", [{**row, "question": f"{name}: {row['question']}"} for row in ROWS])
    assert "has a test split" in error_of(task(tmp_path, folds=2))
