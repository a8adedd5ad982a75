"""Huge, nested and compressed data: read within bounds, or refused with its location."""

from __future__ import annotations

import json
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.annotation.rationales import has_wrong_arithmetic, leaks
from distill.errors import AnswerError, ConfigError
from distill.records import Example
from distill.tasks import packed, tables
from distill.tasks.answers import AnswerFormat
from distill.tasks.expressions import evaluate_expression
from distill.tasks.files import Columns, read_examples
from tests.security.conftest import ANY_TEXT


def read_rows(path: Path, rationale: str | None = None) -> list[Example]:
    columns = Columns("question", "answer", rationale, None)
    answers = AnswerFormat(kind="line", pattern=None, choices=[])
    return list(read_examples(tables.read_file(path), columns, answers).values())


@pytest.mark.parametrize(
    ("column", "value", "length"),
    [("question", "x" * 1_000_001, "1,000,001 characters"), ("why", ["x" * 600_000] * 2, "1,200,001 characters")],
)
def test_a_too_long_value_is_refused_with_its_location(column: str, value: Any, length: str, tmp_path: Path) -> None:
    valid_row = {"question": "x" * 1_000_000, "answer": "4", "why": "x"}
    (tmp_path / "a.jsonl").write_text(json.dumps(valid_row) + "\n" + json.dumps(valid_row | {column: value}))
    with pytest.raises(ConfigError, match=rf"line 2: a text of {length}; at most 1,000,000"):
        read_rows(tmp_path / "a.jsonl", "why")


@pytest.mark.parametrize("depth", [300, 600, 900, 50_000])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_deeply_nested_value_is_read_or_refused_with_its_file(depth: int, name: str, tmp_path: Path) -> None:
    row = '{"question": ' + "[" * depth + '"why"' + "]" * depth + ', "answer": "4"}'
    (tmp_path / name).write_text(f"[{row}]" if name == "a.json" else row)
    message = ""
    try:
        assert read_rows(tmp_path / name)[0].question == "why"
    except ConfigError as error:
        message = str(error)
    assert not message or (str(tmp_path / name) in message and "recursion" in message)
    assert message or depth < 50_000


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_MAX_UNPACKED_BYTES", 2**24)
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 400, pa.int32()), ["x" * 100_000])
    pq.write_table(pa.table({"question": column.cast(pa.string()), "answer": ["4"] * 400}), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 120_000
    with pytest.raises(ConfigError, match=r"a\.parquet has [\d,]+ bytes and unpacks to more than"):
        tables.read_file(tmp_path / "a.parquet")


def test_a_large_table_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_MAX_UNPACKED_BYTES", 0)
    rows = [{"question": f"{i} why?", "answer": str(i)} for i in range(1000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert list(tables.read_file(tmp_path / "a.parquet").rows.values()) == rows


@given(text=st.text("0123456789+-*/(). ,×÷−[]$x", max_size=250) | ANY_TEXT)
@settings(max_examples=200, deadline=None)
def test_an_expression_has_a_bounded_value_or_none(text: str) -> None:
    try:
        value = evaluate_expression(text)
    except ValueError:
        return
    assert isinstance(value, Fraction)
    assert len(str(value)) < 1000


@pytest.mark.parametrize("text", ["9" * 201, "9*" * 5000 + "9", "1+" * 90_000 + "1", "(" * 90_000 + "1" + ")" * 90_000])
def test_a_long_expression_is_not_evaluated(text: str) -> None:
    with pytest.raises(ValueError, match=r"an expression of \d+ characters; at most 200"):
        evaluate_expression(text)


@pytest.mark.parametrize("part", ["(", "( ", "9", "9,999", "1+", "1=", "(1)", " ", "-", "1.", "a'", "1 equals ", "[("])
def test_filters_take_linear_time_in_the_length_of_a_text(part: str) -> None:
    text = f"2 + 2 {part * 30_000}"
    assert not has_wrong_arithmetic(text)
    assert not leaks(text, "42")
    for kind in ("number", "last_number", "expression", "line"):
        with suppress(AnswerError):
            AnswerFormat(kind=kind, pattern=None, choices=[]).read(text)  # type: ignore[arg-type]
