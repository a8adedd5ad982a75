"""Tasks from files: every format gives the same examples, every mistake is named with its place, answers are read."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from distill.app import config as configuration
from distill.errors import AnswerError, ConfigError
from distill.records import Splits
from distill.tasks.contamination import overlaps
from distill.tasks.files import AnswerFormat, FileTask
from tests.conftest import compose

ROWS = [
    {"question": f"Is {i}, said “Jo”,\nmore than 20?", "answer": "yes" if i > 20 else "no", "why": f'{i} "and" 20'}
    for i in range(40)
]
SHOT = {"question": "Is it?", "rationale": "It is so.", "answer": "yes"}


def reader(kind: Any = None, pattern: str | None = None, choices: list[Any] | None = None) -> AnswerFormat:
    return AnswerFormat(kind=kind, pattern=pattern, choices=choices or [])


def task(path: Path | str, **settings: Any) -> FileTask:
    """A task of yes and no from a file, whose columns are called as they are by default."""
    usual = dict.fromkeys(("test_path", "validation_path", "rationale", "num_labelled", "num_unlabelled"))
    usual |= dict.fromkeys(("num_validation", "num_test"))
    sizes = {"root": str(Path(path).parent / "root"), "question": "question", "answer": "answer", "split_seed": 0}
    given = {"path": str(path), "read": reader(choices=["yes", "no"]), "shots": []} | settings
    return FileTask(**{**usual, **sizes, **given})


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows in the format that the path's name says."""
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


def message(found: FileTask) -> str:
    with pytest.raises(ConfigError) as raised:
        found.splits()
    return str(raised.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.folder"])
def test_every_format_gives_the_same_examples_and_writes_nothing(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, ROWS)
    before = sorted(tmp_path.rglob("*"))
    splits = task(path, rationale="why").splits()
    assert sorted(tmp_path.rglob("*")) == before
    found = {(e.question, e.answer, e.rationale) for e in splits.train}
    assert found <= {(row["question"], row["answer"], row["why"]) for row in ROWS}
    assert (len(found), len(splits.validation), len(splits.test)) == (32, 4, 4)
    assert splits == task(write(tmp_path / "other.jsonl", ROWS[::-1]), rationale="why").splits()


def test_a_saved_data_set_brings_its_splits_and_the_names_of_its_labels(tmp_path: Path) -> None:
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


def test_files_of_their_own_are_taken_whole_and_what_they_hold_is_not_trained_on(tmp_path: Path) -> None:
    path, test = write(tmp_path / "train.csv", ROWS[:30]), write(tmp_path / "test.jsonl", ROWS[25:])
    splits = task(path, test_path=str(test), num_validation=5, num_labelled=8).splits()
    assert {e.question for e in splits.test} == {row["question"] for row in ROWS[25:]}
    assert (len(splits.train), len(splits.validation)) == (20, 5)
    assert [e.answer is None for e in splits.train] == [False] * 8 + [True] * 12
    assert splits.dropped == {"train": 5}
    assert len(task(path, test_path=str(test), num_test=3).splits().test) == 3


def test_what_is_held_out_is_decided_by_the_content_not_by_the_order_of_rows(tmp_path: Path) -> None:
    sizes = {"num_labelled": 10, "num_unlabelled": 5, "num_validation": 5, "num_test": 5}
    first = task(write(tmp_path / "a.csv", ROWS), **sizes).splits()
    assert task(write(tmp_path / "b.jsonl", [*ROWS[20:], *ROWS[:20]]), **sizes).splits() == first
    assert task(tmp_path / "a.csv", **sizes, split_seed=1).splits().test != first.test
    assert first.test != tuple(sorted(first.test, key=lambda e: e.question))


def test_a_row_without_answer_is_unlabelled_and_never_held_out(tmp_path: Path) -> None:
    bare = [{"question": f"What of {i}?", "answer": answer, "why": "So."} for i, answer in enumerate(["", None, " \n"])]
    splits = task(jsonl(tmp_path, *bare, {"question": "And?"}, *ROWS), rationale="why").splits()
    unlabelled = [e for e in splits.train if e.answer is None]
    assert {e.question for e in unlabelled} == {"What of 0?", "What of 1?", "What of 2?", "And?"}
    assert splits.train[-4:] == tuple(unlabelled)
    assert all(e.rationale is None for e in unlabelled)
    test = write(tmp_path / "test.jsonl", [ROWS[0], *bare])
    assert "3 rows for test have no 'answer'" in message(task(tmp_path / "rows.jsonl", test_path=str(test)))


def test_a_question_that_stands_twice_counts_once_with_its_label(tmp_path: Path) -> None:
    twice = {"question": ROWS[30]["question"].upper(), "answer": None}
    splits = task(jsonl(tmp_path, twice, *ROWS), num_test=0, num_validation=0).splits()
    assert len(splits.train) == len(ROWS)
    assert all(e.answer for e in splits.train)
    assert splits.dropped == {"train": 1}


@pytest.mark.parametrize(
    ("value", "text"),
    [(True, "true"), (False, "false"), (42.0, "42"), (7, "7"), (0.5, "0.5"), (-3.0, "-3"), (["a", "b"], "a b")],
)
def test_values_that_are_no_text_become_text(value: Any, text: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"question": "Q", "answer": value})
    (example,) = task(path, read=reader("line"), num_test=0, num_validation=0).splits().train
    assert example.answer == text


@pytest.mark.parametrize("value", [None, math.nan])
def test_a_null_of_parquet_is_no_label(value: float | None, tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [{"question": "Q", "answer": value}, {"question": "R", "answer": 1.0}])
    splits = task(path, read=reader("number"), num_test=0, num_validation=0).splits()
    assert {(e.question, e.answer) for e in splits.train} == {("Q", None), ("R", "1")}


def test_control_characters_in_data_are_kept(tmp_path: Path) -> None:
    odd = "a\x00b\x1b[31m\x85\u2028{not a column}\u200b"
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet"):
        path = write(tmp_path / name, [{"question": odd, "answer": odd}])
        (example,) = task(path, read=reader("line"), num_test=0, num_validation=0).splits().train
        assert (example.question, example.answer) == (odd, odd)


def test_a_byte_order_mark_is_not_of_the_first_column(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfquestion,answer\r\nIs it?,yes\r\n")
    assert len(task(tmp_path / "a.csv").splits().train) == 1


def test_a_question_may_be_words_and_columns(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"body": "It {rains}.", "title": "A", "answer": "yes"})
    (example,) = task(path, question="{title}: {body} {{Wet}}?").splits().train
    assert example.question == "A: It {rains}. {Wet}?"


@pytest.mark.parametrize(
    ("question", "told"),
    [
        ("qestion", "has no column 'qestion', but 'question', 'answer', 'why'; did you mean 'question'?"),
        ("{question} {body}", "has no column 'body'"),
        ("{question.__class__}", "has no column 'question.__class__'"),
        ("{question[0]}", "has no column 'question[0]'"),
        ("{}", "has no column ''"),
        ("{question!r}", "nothing but columns in braces"),
        ("{question:>9}", "nothing but columns in braces"),
        ("{question", "wanted words and {columns}"),
    ],
)
def test_a_question_of_anything_but_columns_is_refused(question: str, told: str, tmp_path: Path) -> None:
    assert told in message(task(jsonl(tmp_path, *ROWS), question=question))


def test_missing_columns_are_told_together(tmp_path: Path) -> None:
    told = message(task(jsonl(tmp_path, *ROWS), answer="anwser", rationale="because"))
    assert "no column 'anwser'" in told
    assert "did you mean 'answer'?" in told
    assert "no column 'because'" in told


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", b'{"question": "Q"}\n\n{"question"\n[1]\n', "line 3: Expecting ':'"),
        ("a.jsonl", b'{"question": "Q"}\n\n{"question"\n[1]\n', "line 4: [1] is no object; wanted one JSON object"),
        ("a.jsonl", b"[" * 100_000, "line 1: "),
        ("a.jsonl", b'{"question": "Q"}\n{"question": "\xff"}', "line 2: invalid start byte at byte 14; wanted UTF-8"),
        ("a.jsonl", b'{"question": "\\ud800", "answer": "yes"}', "line 1: 'utf-8' codec can't encode"),
        ("a.jsonl", b'{"question": " ", "answer": "yes"}', "line 1: question is empty"),
        ("a.jsonl", b'{"question": {"a": 1}, "answer": "yes"}', "line 1: {'a': 1} is a dict, wanted a text"),
        ("a.jsonl", b'{"question": "Q", "answer": "maybe"}', "line 1: 'maybe' begins with none of yes, no"),
        ("a.jsonl", b'{"question": "Q", "answer": "yes and no"}', "line 1: 'yes and no' goes on behind 'yes'"),
        ("a.jsonl", b"", "it holds no rows"),
        ("a.json", b'[{"question": "Q"}, 3]', "3 is no object; wanted one array of JSON objects"),
        ("a.json", b'[{"question": "Q"},\n}', "line 2 column 1"),
        ("a.csv", b"question,answer\nQ,yes\nR\nS,no,no", "line 3: 1 fields, the first line has 2; line 4: 3 fields"),
        ("a.csv", b'question,answer\nQ,yes\n"R,no', "line 3: unexpected end of data"),
        ("a.csv", b"question,answer\n\xe4,yes", "line 2: invalid continuation byte"),
        ("a.parquet", b"PAR2", "does not open as Parquet"),
        ("a.txt", b"Q", "wanted a file that ends in .jsonl, .json, .csv, .tsv, .parquet"),
    ],
)
def test_a_broken_file_is_refused_with_its_name_and_the_place(
    name: str, content: bytes, told: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    found = message(task(tmp_path / name))
    assert found.startswith(str(tmp_path / name))
    assert told in found


def test_of_many_problems_the_first_are_shown_and_the_others_counted(tmp_path: Path) -> None:
    rows = [{"question": f"Q{i}", "answer": f"perhaps{i}"} for i in range(9)]
    told = message(task(jsonl(tmp_path, *rows)))
    assert [f"perhaps{i}" in told for i in range(9)] == [True] * 3 + [False] * 6
    assert "and 6 more" in told


def test_what_is_no_file_is_told(tmp_path: Path) -> None:
    assert "does not exist; wanted a file, a folder saved" in message(task(tmp_path / "none.jsonl"))
    (tmp_path / "empty").mkdir()
    assert "was not saved by datasets.save_to_disk" in message(task(tmp_path / "empty"))


def test_a_data_set_of_the_hub_that_cannot_be_had_is_one_clear_error() -> None:
    """In a process of its own, since datasets reads once whether it may use the network."""
    code = (
        "from pathlib import Path; from distill.errors import ConfigError; from distill.tasks import tables\n"
        "try: tables.open_tables('nobody/nothing', Path('root'))\n"
        "except ConfigError as error: print(error)"
    )
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | offline, capture_output=True, text=True)
    assert done.stdout.startswith("nobody/nothing is no file or folder here, and is not to be had from the hub"), done


def test_reading_the_module_loads_neither_datasets_nor_pandas() -> None:
    code = "import sys, distill.tasks.files; assert not {'datasets', 'pandas', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"num_test": 41}, "num_test=41: "),
        ({"num_test": 41}, "has 40 different examples left for it"),
        ({"num_test": 30, "num_validation": 11}, "num_validation=11: "),
        ({"num_test": 10, "num_validation": 10, "num_labelled": 21}, "has 20 different examples left"),
        ({"num_test": 10, "num_validation": 10, "num_labelled": 15, "num_unlabelled": 6}, "has 5 different examples"),
        ({"num_test": 20, "num_validation": 20}, "nothing is left to train on"),
    ],
)
def test_too_few_rows_are_told_with_numbers(sizes: dict[str, int], told: str, tmp_path: Path) -> None:
    assert told in message(task(jsonl(tmp_path, *ROWS), **sizes))


def test_a_negative_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_test=-1"):
        task(tmp_path / "a.jsonl", num_test=-1)


def test_demonstrations_are_read_like_data_and_may_not_be_of_it(tmp_path: Path) -> None:
    path = jsonl(tmp_path, *ROWS)
    (shot,) = task(path, shots=[SHOT | {"answer": "Yes."}]).shots()
    assert (shot.question, shot.rationale, shot.answer) == ("Is it?", "It is so.", "yes")
    assert "is a question of the data too" in message(task(path, shots=[SHOT | {"question": ROWS[3]["question"]}]))
    for wrong in ({"question": "Q"}, SHOT | {"anwser": "no"}, SHOT | {"answer": "perhaps"}):
        with pytest.raises(ConfigError, match=r"task\.examples\.shots"):
            task(path, shots=[wrong])


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
    ("number", "3,4", "3"),
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
    ("pattern", "so it goes #### 1,5 ", "1,5"),
    ("pattern", "so it goes", None),
    ("pattern", "#### ", None),
]


@pytest.mark.parametrize(("kind", "text", "answer"), READ)
def test_an_answer_is_read_as_its_kind_says(kind: Any, text: str, answer: str | None) -> None:
    choices = ["no", "not sure", "yes"] if kind == "choice" else []
    found = reader(kind, "####(.*)" if kind == "pattern" else None, choices)
    if answer is None:
        with pytest.raises(AnswerError):
            found.read(text)
    else:
        assert found.read(text) == answer
        assert kind == "pattern" or found.read(answer) == answer


def test_without_a_kind_it_follows_from_what_is_given() -> None:
    assert [reader(None, "(a)").kind, reader(choices=["a", "b"]).kind, reader().kind] == ["pattern", "choice", "line"]
    assert reader(choices=[True, False, 3, 0.5]).choices == ("true", "false", "3", "0.5")


def test_an_answer_of_any_kind_must_be_among_the_choices_where_there_are_some() -> None:
    found = reader("number", choices=[1, 2, 3])
    assert found.read("2.0 stars") == "2"
    with pytest.raises(AnswerError, match="'4' is none of 1, 2, 3"):
        found.read("4")


@pytest.mark.parametrize(("kind", "text"), [("line", "a\nb"), ("expression", "(3 + 4) times 2"), ("choice", "no\nyes")])
def test_a_gold_answer_of_which_a_part_would_be_lost_is_refused(kind: Any, text: str) -> None:
    with pytest.raises(AnswerError, match="goes on behind"):
        reader(kind, choices=["no", "yes"] if kind == "choice" else None).read_gold(text)


def test_a_pattern_must_find_an_answer_in_the_answer_alone_which_is_what_a_student_writes() -> None:
    assert reader("pattern", "(?s)(?:.*####)?(.+)").read_gold("Three\nand two. #### 5") == "5"
    with pytest.raises(AnswerError, match="is not read as itself"):
        reader("pattern", "####(.+)").read_gold("Three and two. #### 5")


def test_expressions_of_one_value_are_the_same_answer() -> None:
    found = reader("expression")
    first, second, other = (found.read(text) for text in ("( 3.0 + 5.0 )", "(5 + 3)", "(5 - 3)"))
    assert first != second
    assert found.value(first) == found.value(second) != found.value(other)
    assert found.value(found.read("(1 / 3)")) == "1/3"
    assert reader("line").value("(5 + 3)") == "(5 + 3)"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"kind": "pattern", "pattern": "(a"}, "no regular expression"),
        ({"kind": "pattern", "pattern": "a"}, "has 0 groups, wanted one"),
        ({"kind": "pattern", "pattern": "(a)(b)"}, "has 2 groups, wanted one"),
        ({"kind": "pattern", "pattern": None}, "has 0 groups, wanted one"),
        ({"kind": "number", "pattern": "(a)"}, "goes with task.read.kind=pattern"),
        ({"kind": "choice"}, "needs the choices"),
        ({"choices": ["Yes", "yes"]}, "the same but for case"),
        ({"choices": ["", "yes"]}, "some are empty"),
    ],
)
def test_a_way_to_read_that_cannot_work_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        reader(**settings)


def test_the_short_keys_of_the_command_line_reach_the_task(tmp_path: Path) -> None:
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


def public(name: str) -> Path:
    folder = os.environ.get("DISTILL_DATA", "")
    if not folder:
        pytest.skip("DISTILL_DATA names no folder with the public data")
    path = Path(folder) / name
    if not path.is_file():
        pytest.skip(f"{name} is not in the folder that DISTILL_DATA names")
    return path


def published(name: str, path: Path, *overrides: str) -> tuple[FileTask, Splits, list[dict[str, Any]]]:
    """A task of conf/task/ on its public data, its splits, and the rows of the file."""
    config = compose(f"task={name}", f"task.path={path}", *overrides)
    configuration.check(config)
    built = configuration.build(config.task.examples)
    return built, built.splits(), [json.loads(line) for line in path.read_text().strip().split("\n")]


@pytest.mark.parametrize(("name", "size"), [("svamp_palm_train.jsonl", 800), ("svamp_palm_test.jsonl", 200)])
def test_every_gold_equation_of_svamp_reads_and_comes_to_the_answer(name: str, size: int) -> None:
    built, splits, rows = published("svamp", public(name))
    assert len(rows) == size
    assert sum(map(len, (splits.train, splits.validation, splits.test))) + splits.dropped.get("train", 0) == size
    read = [(built.read_answer(row["equation"]), row) for row in rows]
    assert all(Fraction(built.value(answer)) == Fraction(row["answer"]) for answer, row in read)
    tidy = (answer.replace("(", "").replace(")", "").split(" ") for answer, _ in read)
    assert all(piece in "+-*/" or str(float(piece)).removesuffix(".0") == piece for pieces in tidy for piece in pieces)


def test_most_answers_of_the_published_teacher_of_svamp_read() -> None:
    """Which: those with closed brackets and no unknown, up to the words behind them."""
    built, _, rows = published("svamp", public("svamp_palm_train.jsonl"))
    unread = []
    for row in rows:
        try:
            built.read_answer(row["teacher_answer"] or "")
        except AnswerError:
            unread.append(row["teacher_answer"] or "()")
    is_open = [text.count("(") != text.count(")") for text in unread]
    has_words = [any(c.isalpha() or c in "=,$%" for c in text) for text in unread]
    assert len(unread) < 0.05 * len(rows)
    assert all(o or w or text == "()" for o, w, text in zip(is_open, has_words, unread, strict=True)), unread


def test_the_public_reasoning_of_gsm8k_and_strategyqa_comes_with_the_answers() -> None:
    train, test = public("gsm8k_train.jsonl"), public("gsm8k_test.jsonl")
    built, splits, rows = published("gsm8k", train, f"task.test_path={test}")
    answers = {row["question"].strip(): (row["answer"].replace(",", ""), row["human_rationale"]) for row in rows}
    assert all(answers[e.question] == (e.answer, e.rationale) for e in splits.train)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (2900, 100, 1319)
    built, splits, rows = published("strategyqa", public("strategyqa_train.jsonl"))
    facts = {row["question"].strip(): (str(row["answer"]).lower(), " ".join(row["facts"]).strip()) for row in rows}
    assert all(facts[e.question] == (e.answer, e.rationale) for e in splits.train)
    assert built.choices == ("true", "false")


@pytest.mark.parametrize(("name", "file"), [("svamp", "svamp_palm"), ("gsm8k", "gsm8k"), ("strategyqa", "strategyqa")])
def test_demonstrations_are_not_copied_from_the_public_data(name: str, file: str) -> None:
    built, splits, _ = published(name, public(f"{file}_train.jsonl"))
    every = (*splits.train, *splits.validation, *splits.test)
    assert overlaps(Splits(tuple(built.shots()), (), every), 8) == []
