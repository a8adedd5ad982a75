"""Law 10: disjoint splits, for every task in conf/task/; reading answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from distill import records
from distill.app import config as configuration
from distill.errors import AnswerError, ConfigError
from distill.records import SPLITS, Example, RowCounts, Splits, content_id, folded_id
from distill.tasks.movie_reviews import read_ratings
from tests.conftest import arithmetic, compose, conf_names

QUESTION = Example("?")
LABELLED = [name for name in conf_names("task") if name != "instruct"]  # tests/tasks/test_instructions.py has that
SMALL = {"num_labelled": 8, "num_unlabelled": 20, "num_validation": 7, "num_test": 9}
USER_SETTINGS = {  # of tasks that work only with settings of the user
    "jsonl": ["task.choices=[yes,no]", "task.examples.shots=[{question: Is it?, rationale: It is so., answer: yes}]"],
    "chat": ["task.examples.shots=[{question: Is it?, rationale: It is so., answer: It is.}]"],
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
    if "path" in task or OmegaConf.is_missing(task, "path"):
        task.path = str(tmp_path / "rows.jsonl")
        Path(task.path).write_text("\n".join(json.dumps(row_of(task, i)) for i in range(90)))
    if "root" in node:
        node.root = str(tmp_path)
    return configuration.build(node)


def row_of(task: DictConfig, number: int) -> dict[str, Any]:
    """A row with the columns of the task's file."""
    if "messages" in task:
        contents = (("user", f"Question number {number} appears."), ("assistant", f"It is\n\n{number}."))
        return {"messages": [{"role": role, "content": content} for role, content in contents]}
    kinds = {"expression": f"( {number}.0 + 2.0 )", "number": f"{number},000"}
    row = {task.question: f"Question number {number} appears."}
    if isinstance(task.choices, str):
        row |= {task.choices: ["one", "two", "three"], task.answer: "ABC"[number % 3]}
    else:
        row |= {task.answer: task.choices[number % 2] if task.choices else kinds[task.read.kind]}
    return row | ({task.rationale: [f"Because of {number}."]} if task.rationale else {})


@pytest.mark.parametrize("name", LABELLED)
def test_splits_are_disjoint_and_of_the_configured_sizes(name: str, tmp_path: Path) -> None:
    splits = build_task(name, tmp_path).splits()
    ids = [{example.id for example in part} for part in (splits.train, splits.validation, splits.test)]
    assert [len(part) for part in ids] == [28, 7, 9]
    assert len(set.union(*ids)) == 44
    assert all(counts.read == sum(counts.lost.values()) + counts.kept for counts in splits.counts.values())
    assert [splits.counts[split].kept for split in SPLITS] == [28, 7, 9]


@pytest.mark.parametrize("name", LABELLED)
def test_labelled_train_examples_come_first_and_the_others_have_no_labels(name: str, tmp_path: Path) -> None:
    task = build_task(name, tmp_path)
    splits = task.splits()
    assert all(example.answer is not None for example in (*splits.train[:8], *splits.validation, *splits.test))
    assert all(example.answer is None and example.rationale is None for example in splits.train[8:])
    assert all(task.read_answer(f" {e.answer}\n", e) == e.answer for e in (*splits.train[:8], *splits.test))


@pytest.mark.parametrize("name", LABELLED)
def test_demonstrations_are_complete_and_in_no_split(name: str, tmp_path: Path) -> None:
    task = build_task(name, tmp_path)
    splits, shots = task.splits(), task.shots()
    split_ids = {example.id for part in (splits.train, splits.validation, splits.test) for example in part}
    assert shots
    assert all(shot.answer and shot.rationale and shot.id not in split_ids for shot in shots)


@pytest.mark.parametrize("name", LABELLED)
def test_more_unlabelled_examples_do_not_change_the_other_examples(name: str, tmp_path: Path) -> None:
    few, many = (build_task(name, tmp_path, num_unlabelled=n) for n in (20, 25))
    assert many.splits().train[:28] == few.splits().train
    assert (many.splits().validation, many.splits().test) == (few.splits().validation, few.splits().test)
    assert tuple(many.shots()) == tuple(few.shots())


@pytest.mark.parametrize("name", LABELLED)
def test_splits_are_reproducible_and_differ_with_another_seed(name: str, tmp_path: Path) -> None:
    assert build_task(name, tmp_path).splits() == build_task(name, tmp_path).splits()
    assert build_task(name, tmp_path).splits().test != build_task(name, tmp_path, split_seed=1).splits().test


@pytest.mark.parametrize("name", [name for name in LABELLED if name != "chat"])  # where any text answers
@pytest.mark.parametrize("text", ["", "?", "\n7 negative"[:1]])
def test_a_text_without_an_answer_raises_an_answer_error(name: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(AnswerError):
        build_task(name, tmp_path).read_answer(text, QUESTION)


def test_examples_shared_by_two_splits_are_dropped_from_the_earlier_split_and_counted() -> None:
    a, b, c, d = (Example(f"Question {name}?", name) for name in "abcd")
    spaced = Example("  Question b?\n", "b")
    splits = Splits.disjoint(train=[a, spaced, c, a], validation=[b, d, d], test=[d, d])
    assert (splits.train, splits.validation, splits.test) == ((a, c), (b,), (d,))
    assert splits.counts == {
        "train": RowCounts(4, {"in another split": 1, "repeated": 1}, 2),
        "validation": RowCounts(3, {"in another split": 2}, 1),
        "test": RowCounts(2, {"repeated": 1}, 1),
    }


@pytest.mark.parametrize(
    ("text", "other", "same_id", "same_folded_id"),
    [
        ("How many apples?", " How many apples?\n", True, True),
        ("Gr\u00f6\u00dfe?", "Gro\u0308\u00dfe?", True, True),
        ("How many apples?", "how  MANY\tApples?", False, True),
        ("How much is 2⁵?", "How much is 25?", False, True),
        ("if a:\n  b()\nc()", "if a:\n  b()\n  c()", False, True),
        ("print(A)", "print(a)", False, True),
        ("How many apples?", "How many apple?", False, False),
    ],
)
def test_an_id_ignores_outer_spaces_and_composition_and_a_folded_id_also_case_spacing_and_forms(
    text: str, other: str, same_id: bool, same_folded_id: bool
) -> None:
    assert (content_id(text) == content_id(other)) == same_id
    assert (folded_id(text) == folded_id(other)) == same_folded_id
    assert (Example(text, "3").id == Example(other).id) == same_id


def test_an_id_is_computed_once_per_example(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    monkeypatch.setattr(records, "content_id", lambda text: hashed.append(text) or text)
    example = Example("How many?")
    assert [example.id, example.id, hashed] == ["How many?", "How many?", ["How many?"]]
    assert example == Example("How many?")


@pytest.mark.parametrize("name", ["gsm8k", "strategyqa", "svamp"])
def test_a_task_sets_the_lengths_of_teacher_student_and_prompts(name: str) -> None:
    config = compose(f"task={name}", "task.path=none", "teacher=causal_lm")
    limits = (config.max_new_tokens, config.teacher.kind.max_new_tokens, config.prompt.max_length)
    assert limits == (config.task.max_new_tokens, config.task.max_new_tokens, config.task.max_length)
    assert limits > (40, 40, 255)
    config = compose(f"task={name}", "task.path=none", "task.max_new_tokens=9", "prompt.max_length=99")
    assert (config.max_new_tokens, config.teacher.kind.max_new_tokens, config.prompt.max_length) == (9, 9, 99)
    config = compose("task=arithmetic")
    assert (config.max_new_tokens, config.teacher.kind.max_new_tokens, config.prompt.max_length) == (40, 40, 256)


def test_generated_rationales_derive_their_answers() -> None:
    task = arithmetic(num_labelled=60)
    for example in (*task.splits().train[:60], *task.shots()):
        assert example.rationale is not None
        for step in example.rationale.rstrip(".").split(". "):
            left, sign, right, _, result = step.split()
            assert int(result) == int(left) + {"+": 1, "-": -1}[sign] * int(right)
        assert result == example.answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [("7", "7"), (" 007.", "7"), ("1,204 pens", "1204"), ("-3", "-3"), ("so 4 or 5", "4"), ("7.0", "7")],
)
def test_arithmetic_reads_the_first_whole_number(text: str, answer: str) -> None:
    assert arithmetic().read_answer(text, QUESTION) == answer


@pytest.mark.parametrize("text", ["7.5", "7/2", "7,5", "1e-3", "7 000 000"])
def test_arithmetic_reads_no_part_of_a_number(text: str) -> None:
    with pytest.raises(AnswerError):
        arithmetic().read_answer(text, QUESTION)


def test_impossible_settings_of_arithmetic_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_steps=3"):
        arithmetic(max_steps=3)
    with pytest.raises(ConfigError, match="too few distinct problems"):
        arithmetic(max_number=2, max_steps=1, num_test=800).splits()


@pytest.mark.parametrize("line", [b"1\t2.5", b"1\tmuch\tGood.", b"1\t2\t ", b"1\t2\t\xff\xfe"])
def test_a_broken_ratings_file_is_refused_with_its_line_number(line: bytes, tmp_path: Path) -> None:
    (tmp_path / "file.tsv").write_bytes(b"0\t1.5\tFine.\n" + line + b"\n" + line)
    with pytest.raises(ConfigError, match=r"line 2: .*, and 1 more lines; expected: id <tab> rating <tab> text"):
        read_ratings(tmp_path / "file.tsv")


def test_movie_reviews_count_the_ratings_that_they_leave_out(tmp_path: Path) -> None:
    rows = ["1.5\tFine.", "-0.4\tSo so.", "-3\tBad.", "2\t Fine. ", "2\tOdd.", "-2\tOdd.", "3\tGood."]
    (tmp_path / "ratings.tsv").write_text("\n".join(f"{i}\t{row}" for i, row in enumerate(rows)))
    sizes = ["num_labelled=1", "num_unlabelled=0", "num_validation=0", "num_test=1"]
    overrides = [f"task.examples.{size}" for size in sizes]
    node = compose("task=movie_reviews", f"task.examples.file={tmp_path / 'ratings.tsv'}", *overrides).task.examples
    splits = configuration.build(node).splits()
    lost = {"rated near neutral": 1, "contradicting": 2, "repeated": 1, "over num_unlabelled": 1}
    assert splits.counts["train"] == RowCounts(6, lost, 1)
    assert {example.question for example in (*splits.train, *splits.test)} < {"Fine.", "Bad.", "Good."}
