"""What becomes of the rows of a file: repeats, contradictions, several answers, held-out sizes; all are counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig
from pyarrow import parquet

from distill.errors import ConfigError
from distill.evaluation.job import evaluate
from distill.lessons.curriculum import prepare
from distill.records import SPLITS, Example, RowCounts
from distill.tasks import files, is_right
from distill.tasks.contamination import screen_splits
from tests.conftest import compose
from tests.tasks.conftest import answer_format
from tests.tasks.test_files import error_of, jsonl, task, write

ALL = {"num_test": 0, "num_validation": 0}


def rows(*answers: Any, question: str = "Is it?") -> list[dict[str, Any]]:
    return [{"question": question, "answer": answer} for answer in answers]


def contradicting(tmp_path: Path) -> Path:
    """Thirty questions whose rows say yes, yes, no."""
    return jsonl(tmp_path, *(row for i in range(30) for row in rows("yes", "yes", "no", question=f"Is {i} so?")))


def test_rows_with_different_answers_are_refused_with_their_number_and_places(tmp_path: Path) -> None:
    error = error_of(task(contradicting(tmp_path)))
    assert "rows with different answers for 30 questions: line 1 says 'yes' but line 3 says 'no'; line 4" in error
    assert "and 27 more" in error
    assert "task.conflicts=drop" in error
    assert "task.conflicts=majority" in error


def test_rows_with_different_answers_are_decided_by_majority_or_dropped(tmp_path: Path) -> None:
    majority = task(contradicting(tmp_path), conflicts="majority", **ALL).splits()
    assert {example.answer for example in majority.train} == {"yes"}
    assert majority.counts["train"] == RowCounts(90, {"contradicting": 30, "repeated": 30}, 30)
    path = jsonl(tmp_path, *rows("yes", "yes", "no"), *rows("no", question="Was it?"))
    dropped = task(path, conflicts="drop", **ALL).splits()
    assert [example.question for example in dropped.train] == ["Was it?"]
    assert dropped.counts["train"] == RowCounts(4, {"contradicting": 3}, 1)


@pytest.mark.parametrize("answers", [("yes", "no"), ("no", "yes", None), ("yes", "no", "no", "yes")])
def test_equally_frequent_answers_are_dropped_and_not_decided_by_the_alphabet(
    answers: tuple[str | None, ...], tmp_path: Path
) -> None:
    path = jsonl(tmp_path, *rows(*answers), *rows("no", question="Was it?"))
    splits = task(path, conflicts="majority", **ALL).splits()
    assert [example.question for example in splits.train] == ["Was it?"]
    assert splits.counts["train"] == RowCounts(len(answers) + 1, {"contradicting": len(answers)}, 1)


@pytest.mark.parametrize(
    ("answers", "right"),
    [
        ([["a", "b"], ["b"], ["c"]], ("a", "b")),  # b is right in two of three rows
        ([["a", "b"], ["b", "a"], ["c"]], ("a", "b")),  # two answers of the same rows are no tie
        ([["a", "b"], ["b", "c"], ["c", "d"], ["d"]], None),
    ],
)
def test_every_accepted_answer_of_a_row_counts_for_the_majority(
    answers: list[list[str]], right: tuple[str, ...] | None, tmp_path: Path
) -> None:
    path = jsonl(tmp_path, *rows(*answers), *rows("e", question="Was it?"))
    splits = task(path, read=answer_format("line"), conflicts="majority", **ALL).splits()
    assert {e.question: e.right_answers for e in splits.train}.get("Is it?") == right


@pytest.mark.parametrize("name", ["test", "validation"])
def test_contradicting_rows_of_held_out_files_are_refused_and_dropped_too(name: str, tmp_path: Path) -> None:
    held_out = write(tmp_path / "held_out.csv", [*rows("yes", "no"), *rows("no", question="Was it?")])
    path = jsonl(tmp_path, *rows("yes", question="Will it?"))
    file = {f"{name}_path": str(held_out)}
    assert "held_out.csv: rows with different answers for 1 question: line 2 says 'yes'" in error_of(task(path, **file))
    splits = task(path, conflicts="drop", **file).splits()
    assert splits.counts[name] == RowCounts(3, {"contradicting": 2}, 1)


def test_answers_of_one_value_do_not_contradict_each_other(tmp_path: Path) -> None:
    path = jsonl(tmp_path, *rows("(3 + 5)", "(3.0+5)", "8", None))
    splits = task(path, read=answer_format("expression"), **ALL).splits()
    assert splits.counts["train"] == RowCounts(4, {"repeated": 3}, 1)
    path = jsonl(tmp_path, *rows(["Paris", "Paris, France"], ["Paris, France"]))
    assert len(task(path, read=answer_format("line"), **ALL).splits().train) == 1
    assert "different answers" in error_of(
        task(jsonl(tmp_path, *rows("Paris", "Lyon")), read=answer_format("line"), **ALL)
    )


def test_of_repeated_rows_a_labelled_one_with_a_rationale_is_kept(tmp_path: Path) -> None:
    reason = {"question": "Is it?", "answer": "yes", "why": "It is."}
    splits = task(jsonl(tmp_path, *rows(None, "yes"), reason), rationale="why", **ALL).splits()
    assert splits.train == (Example("Is it?", "yes", "It is."),)


def test_of_several_answers_the_first_is_trained_on_and_all_are_right(tmp_path: Path) -> None:
    path = jsonl(tmp_path, *rows(["Paris", "paris, France", "Paris", ""]))
    lines = task(path, read=answer_format("line"), **ALL)
    (example,) = lines.splits().train
    assert (example.answer, example.accepted) == ("Paris", ("paris, France",))
    answers = ["Paris", "paris, France", "paris", "France", None]
    assert [is_right(lines, answer, example) for answer in answers] == [True, True, False, False, False]


@pytest.mark.parametrize(("value", "answer"), [(["Paris"], "Paris"), ([3], "3"), ([], None), ([None, ""], None)])
def test_a_list_of_one_answer_is_read_as_its_item(value: Any, answer: str | None, tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.parquet"):
        path = write(tmp_path / name, rows(value))
        (example,) = task(path, read=answer_format("line"), **ALL).splits().train
        assert (example.answer, example.accepted) == (answer, ())


@pytest.mark.parametrize("row", [{"question": ["Is", "it?"]}, {"answer": ["yes", ["no", "maybe"]]}])
def test_a_list_where_one_text_is_expected_is_refused(row: dict[str, Any], tmp_path: Path) -> None:
    assert "line 1: ['" in (error := error_of(task(jsonl(tmp_path, rows("yes")[0] | row))))
    assert "is a list of 2 values, expected one text or number" in error


REPEATED = {
    "a.csv": "question,answer,answer\nIs it?,yes,no\n",
    "a.tsv": "answer\tquestion\tanswer\nyes\tIs it?\tno\n",
    "a.jsonl": '{"question": "Is it?", "answer": "yes", "answer": "no"}\n',
    "a.json": '[{"question": "Is it?", "answer": "yes", "answer": "no"}]',
}


@pytest.mark.parametrize("name", [*REPEATED, "a.parquet"])
def test_a_repeated_column_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    if name == "a.parquet":
        columns = [pyarrow.array([text]) for text in ("Is it?", "yes", "no")]
        parquet.write_table(pyarrow.table(columns, names=["question", "answer", "answer"]), tmp_path / name)
    else:
        (tmp_path / name).write_text(REPEATED[name])
    error = error_of(task(tmp_path / name))
    assert "'answer'" in error
    assert "more than one column" in error or "appears twice" in error


def test_columns_without_a_name_may_repeat(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question,answer,,\nIs it?,yes,,\n")
    assert len(task(tmp_path / "a.csv", **ALL).splits().train) == 1


VALUES = [
    (b"1e16", "10000000000000000"),
    (b"1e-05", "0.00001"),
    (b"0.1", "0.1"),
    (b"1.50", "1.5"),
    (b"-0.0", "0"),
    (b"12345678901234567890.125", "12345678901234567890.125"),
    (b"1e400", "1" + "0" * 400),
    (b"123456789012345678901234567890", "123456789012345678901234567890"),
]


@pytest.mark.parametrize(("value", "answer"), VALUES)
def test_a_json_number_keeps_its_value(value: bytes, answer: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"question": "Q", "answer": ' + value + b"}")
    for kind in ("number", "last_number", "line"):
        (example,) = task(tmp_path / "a.jsonl", read=answer_format(kind), **ALL).splits().train
        assert example.answer == answer


@pytest.mark.parametrize("value", ["Infinity", "-Infinity", "1e2000", "1e99999999999999999999", "true", '"nan"'])
def test_a_value_that_is_no_number_is_refused_as_one(value: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"question": "Q", "answer": {value}}}')
    assert "line 1: " in error_of(task(tmp_path / "a.jsonl", read=answer_format("number"), **ALL))


def test_single_precision_numbers_are_read_as_they_were_written(tmp_path: Path) -> None:
    table = pyarrow.table({"question": ["Q"], "answer": pyarrow.array([0.1], pyarrow.float32())})
    parquet.write_table(table, tmp_path / "a.parquet")
    (example,) = task(tmp_path / "a.parquet", read=answer_format("number"), **ALL).splits().train
    assert example.answer == "0.1"


@pytest.mark.parametrize("escape", [r"\n", r"\n\n", r"\t"])
def test_a_line_break_that_stayed_two_characters_is_refused(escape: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path, *rows("yes"))
    error = error_of(task(path, question=f"{{question}}{escape}{{answer}}"))
    assert rf"contains a backslash and a letter, {escape[:2]}," in error
    assert f'in bash $\'task.question="…{escape[:2]}…"\', in a YAML file question: "…{escape[:2]}…"' in error
    (example,) = task(path, question="{question}\n{answer}", **ALL).splits().train
    assert example.question == "Is it?\nyes"
    (example,) = task(path, question=r"Simplify $\nabla \neq \theta$: {question}", **ALL).splits().train
    assert example.question == r"Simplify $\nabla \neq \theta$: Is it?"


def test_composed_and_decomposed_letters_are_the_same(tmp_path: Path) -> None:
    composed, decomposed = "gr\u00f6\u00dfer", "gro\u0308\u00dfer"
    for choice, label in ((composed, decomposed), (decomposed, composed)):
        lines = task(jsonl(tmp_path, *rows(label)), read=answer_format(choices=[choice, "kleiner"]), **ALL)
        assert lines.choices[0] == lines.splits().train[0].answer == composed
        assert [lines.read_answer(f"{text}, ja", Example("?")) for text in (composed, decomposed)] == [composed] * 2
    for kind, pattern in (("line", None), ("pattern", f"({decomposed})")):
        lines = task(jsonl(tmp_path, *rows(decomposed)), read=answer_format(kind, pattern), **ALL)
        assert lines.value(lines.read_answer(composed, Example("?"))) == lines.splits().train[0].answer == composed
    both = jsonl(tmp_path, *rows("yes", question=composed), *rows("yes", question=decomposed))
    assert task(both, **ALL).splits().counts["train"] == RowCounts(2, {"repeated": 1}, 1)


@pytest.mark.parametrize(("number", "held_out"), [(9, 0), (10, 1), (199, 19), (201, 20), (300, 20)])
def test_a_tenth_is_held_out_up_to_a_limit(
    number: int, held_out: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert files._MAX_HELD_OUT == 2000
    monkeypatch.setattr(files, "_MAX_HELD_OUT", 20)
    splits = task(jsonl(tmp_path, *({"question": f"Q{i}", "answer": "yes"} for i in range(number)))).splits()
    assert (len(splits.test), len(splits.validation)) == (held_out, held_out)
    assert sum(counts.read for counts in splits.counts.values()) == number


ROW = st.tuples(
    st.sampled_from(["a b c", "A B C", "a  b c", " a b c", "d", "e", "f", "g", "a b c x", "h"]),
    st.sampled_from([None, "", "yes", "no", "Yes.", ["yes"], ["no", "yes"]]),
)
SIZES = st.fixed_dictionaries(
    {}, optional={name: st.integers(0, 3) for name in ("num_labelled", "num_unlabelled", "num_validation", "num_test")}
)


@given(
    tables=st.fixed_dictionaries(
        {"train": st.lists(ROW, min_size=1, max_size=20)},
        optional={
            name: st.lists(ROW.filter(lambda row: row[1] not in (None, "")), min_size=1, max_size=6)
            for name in ("validation", "test")
        },
    ),
    sizes=SIZES,
    conflicts=st.sampled_from(["drop", "majority"]),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_every_row_read_is_kept_or_counted_as_lost(
    tables: dict[str, list[Any]], sizes: dict[str, int], conflicts: str, tmp_path: Path
) -> None:
    paths = {}
    for name, table in tables.items():
        paths[name] = tmp_path / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps({"question": q, "answer": a}) + "\n\n" for q, a in table))
    held_out = {f"{name}_path": str(path) for name, path in paths.items() if name != "train"}
    try:
        splits = task(paths["train"], conflicts=conflicts, **held_out, **sizes).splits()
    except ConfigError as error:
        if "examples left for it" in str(error) or "no examples are left for training" in str(error):
            return
        raise
    screened, _ = screen_splits(splits, 3, "drop")
    for part in (splits, screened):
        for name in SPLITS:
            counts = part.counts[name]
            assert counts.kept == len(getattr(part, name))
            assert counts.read == sum(counts.lost.values()) + counts.kept
            assert all(number > 0 for number in counts.lost.values())
        assert sum(counts.read for counts in part.counts.values()) == sum(map(len, tables.values()))
        assert all(part.counts[name].read == len(tables[name]) for name in tables if name != "train")


@pytest.mark.parametrize("answers", [["yes"] * 9, [None] * 12])
def test_a_run_without_held_out_rows_is_refused_before_the_teacher_is_asked(
    answers: list[str | None], tmp_path: Path, configured: Callable[..., DictConfig]
) -> None:
    path = jsonl(tmp_path, *(row for i, answer in enumerate(answers) for row in rows(answer, question=f"Is {i}?")))
    overrides = ["task=jsonl", f"task.path={path}", "task.choices=[yes,no]", "prompt.num_shots=0", f"root={tmp_path}"]
    config = configured("teacher.calibrate=0")
    config.task = compose(*overrides).task
    config.prompt.num_shots = 0
    with pytest.raises(ConfigError) as raised:
        prepare(config, tmp_path)
    for name in ("validation", "test"):
        assert f"there are no labelled rows for {name}: give a file (task.{name}_path)" in str(raised.value)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("split", "error"), [("test", "no labelled rows for test"), ("tset", "expected train")])
def test_evaluation_on_a_split_without_rows_is_refused(
    split: str, error: str, tmp_path: Path, student_folder: Path
) -> None:
    overrides = [
        "task=jsonl",
        f"task.path={jsonl(tmp_path, *rows('yes'))}",
        f"model={student_folder}",
        f"split={split}",
    ]
    with pytest.raises(ConfigError, match=error):
        evaluate(compose(*overrides, "task.choices=[yes,no]", name="evaluate"))
