"""Law 10: disjoint splits, for every task in conf/task/; reading answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from distill.app import config as configuration
from distill.errors import AnswerError, ConfigError
from distill.records import Example, Splits, content_id
from distill.tasks.movie_reviews import read_ratings
from tests.conftest import arithmetic, compose, conf_names

SMALL = {"num_labelled": 8, "num_unlabelled": 20, "num_validation": 7, "num_test": 9}
USER_SETTINGS = {  # of tasks that work only with settings of the user
    "jsonl": ["task.choices=[yes,no]", "task.examples.shots=[{question: Is it?, rationale: It is so., answer: yes}]"]
}


def build_task(name: str, tmp_path: Path, **sizes: int) -> Any:
    """A small task of conf/task/; a task that reads a file gets a generated file."""
    task = compose(f"task={name}", *USER_SETTINGS.get(name, [])).task
    node = task.examples
    for key, value in (SMALL | sizes).items():
        assert key in node
        node[key] = value
    if "file" in node:
        node.file = str(tmp_path / "ratings.tsv")
        lines = [f"{i}\t{2.5 if i % 2 else -2.5}\tSentence number {i} is rated." for i in range(90)]
        Path(node.file).write_text("\n".join([*lines, lines[5].upper().replace("5\t", "91\t", 1)]))
    if OmegaConf.is_missing(task, "path"):
        task.path = str(tmp_path / "rows.jsonl")
        Path(task.path).write_text("\n".join(json.dumps(row_of(task, i)) for i in range(90)))
    if "root" in node:
        node.root = str(tmp_path)
    return configuration.build(node)


def row_of(task: DictConfig, number: int) -> dict[str, Any]:
    """A row with the columns of the task's file."""
    kinds = {"expression": f"( {number}.0 + 2.0 )", "number": f"{number},000"}
    answer = task.choices[number % 2] if task.choices else kinds[task.read.kind]
    row = {task.question: f"Question number {number} appears.", task.answer: answer}
    return row | ({task.rationale: [f"Because of {number}."]} if task.rationale else {})


@pytest.mark.parametrize("name", conf_names("task"))
def test_splits_are_disjoint_and_of_the_configured_sizes(name: str, tmp_path: Path) -> None:
    splits = build_task(name, tmp_path).splits()
    ids = [{example.id for example in part} for part in (splits.train, splits.validation, splits.test)]
    assert [len(part) for part in ids] == [28, 7, 9]
    assert len(set.union(*ids)) == 44
    assert splits.dropped == {}


@pytest.mark.parametrize("name", conf_names("task"))
def test_labelled_train_examples_come_first_and_the_others_have_no_labels(name: str, tmp_path: Path) -> None:
    task = build_task(name, tmp_path)
    splits = task.splits()
    assert all(example.answer is not None for example in (*splits.train[:8], *splits.validation, *splits.test))
    assert all(example.answer is None and example.rationale is None for example in splits.train[8:])
    assert all(task.read_answer(f" {e.answer}\n") == e.answer for e in (*splits.train[:8], *splits.test))


@pytest.mark.parametrize("name", conf_names("task"))
def test_demonstrations_are_complete_and_in_no_split(name: str, tmp_path: Path) -> None:
    task = build_task(name, tmp_path)
    splits, shots = task.splits(), task.shots()
    split_ids = {example.id for part in (splits.train, splits.validation, splits.test) for example in part}
    assert shots
    assert all(shot.answer and shot.rationale and shot.id not in split_ids for shot in shots)


@pytest.mark.parametrize("name", conf_names("task"))
def test_more_unlabelled_examples_do_not_change_the_other_examples(name: str, tmp_path: Path) -> None:
    few, many = (build_task(name, tmp_path, num_unlabelled=n) for n in (20, 25))
    assert many.splits().train[:28] == few.splits().train
    assert (many.splits().validation, many.splits().test) == (few.splits().validation, few.splits().test)
    assert tuple(many.shots()) == tuple(few.shots())


@pytest.mark.parametrize("name", conf_names("task"))
def test_splits_are_reproducible_and_differ_with_another_seed(name: str, tmp_path: Path) -> None:
    assert build_task(name, tmp_path).splits() == build_task(name, tmp_path).splits()
    assert build_task(name, tmp_path).splits().test != build_task(name, tmp_path, split_seed=1).splits().test


@pytest.mark.parametrize("name", conf_names("task"))
@pytest.mark.parametrize("text", ["", "?", "\n7 negative"[:1]])
def test_a_text_without_an_answer_raises_an_answer_error(name: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(AnswerError):
        build_task(name, tmp_path).read_answer(text)


def test_examples_shared_by_two_splits_are_dropped_from_the_earlier_split_and_counted() -> None:
    a, b, c, d = (Example(f"Question {name}?", name) for name in "abcd")
    uppercase = Example("  QUESTION   B? ", "b")
    splits = Splits.disjoint(train=[a, uppercase, c, a], validation=[b, d, d], test=[d, d])
    assert (splits.train, splits.validation, splits.test) == ((a, c), (b,), (d,))
    assert splits.dropped == {"train": 2, "validation": 2, "test": 1}


@pytest.mark.parametrize("other", ["how  MANY\tApples?", " How many apples?\n", "Ｈow many apples?"])
def test_an_id_ignores_case_spacing_and_unicode_form(other: str) -> None:
    assert content_id(other) == content_id("How many apples?")
    assert content_id("How many apple?") != content_id("How many apples?")
    assert Example(other, "3").id == Example("How many apples?").id


def test_generated_rationales_derive_their_answers() -> None:
    task = arithmetic(num_labelled=60)
    for example in (*task.splits().train[:60], *task.shots()):
        assert example.rationale is not None
        for step in example.rationale.rstrip(".").split(". "):
            left, sign, right, _, result = step.split()
            assert int(result) == int(left) + {"+": 1, "-": -1}[sign] * int(right)
        assert result == example.answer


@pytest.mark.parametrize(
    ("text", "answer"), [("7", "7"), (" 007.", "7"), ("1,204 pens", "1204"), ("-3", "-3"), ("so 4 or 5", "4")]
)
def test_arithmetic_reads_the_first_whole_number(text: str, answer: str) -> None:
    assert arithmetic().read_answer(text) == answer


def test_impossible_settings_of_arithmetic_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_steps=3"):
        arithmetic(max_steps=3)
    with pytest.raises(ConfigError, match="too few distinct problems"):
        arithmetic(max_number=2, max_steps=1, num_test=4000).splits()


@pytest.mark.parametrize("line", [b"1\t2.5", b"1\tmuch\tGood.", b"1\t2\t ", b"1\t2\t\xff\xfe"])
def test_a_broken_ratings_file_is_refused_with_its_line_number(line: bytes, tmp_path: Path) -> None:
    (tmp_path / "file.tsv").write_bytes(b"0\t1.5\tFine.\n" + line + b"\n" + line)
    with pytest.raises(ConfigError, match=r"line 2: .*, and 1 more lines; expected: id <tab> rating <tab> text"):
        read_ratings(tmp_path / "file.tsv", 0.5)


def test_near_neutral_and_repeated_ratings_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "file.tsv").write_text("0\t1.5\tFine.\n1\t-0.4\tSo so.\n2\t-3\tBad.\n3\t2\t FINE. \n")
    assert read_ratings(tmp_path / "file.tsv", 0.5) == [Example("Fine.", "positive"), Example("Bad.", "negative")]
