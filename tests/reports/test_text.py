"""The tables for a terminal fit its width."""

from __future__ import annotations

from typing import Any

import pytest

from distill.app.console import terminal_width
from distill.reports.text import to_text
from tests.reports.conftest import Make, answers, prediction, summary_of, with_latency


def test_terminal_table_fits_in_110_columns(make_run: Make) -> None:
    big = {
        "parameters": 123_456_789_012,
        "size_bytes": 987_654_321_012,
        "ms_per_example": 12345.6,
        "training_seconds": 360_000,
    }
    losses = ("answer", "kl", "rationale", "reverse_kl", "a_loss_with_a_rather_long_name")
    runs = [make_run(losses, 0.9 + 0.01 * seed, seed, student=big) for seed in range(3)]
    text = to_text(summary_of(*runs, make_run(("answer",))))
    assert max(map(len, text.splitlines())) <= 110
    assert "123.5 B" in text
    assert "100.0 h" in text


def test_terminal_tables_of_differences_and_costs_fit_in_110_columns(make_run: Make) -> None:
    losses = ("answer", "kl", "rationale", "reverse_kl", "a_loss_with_a_rather_long_name")
    prices = {"price_per_hour": 9e5, "requests_per_day": 0.37}
    same = [row | {"teacher_answer": "positive"} for row in answers(("answer",), 0.8, 0)]
    hard = make_run(("answer", "teacher_answer"), 0.8, student=with_latency(11.999))
    priced = [
        hard,
        make_run(("answer",), 0.80, predictions=same),
        make_run(losses, 0.805, student={"ms_per_example": None}),
    ]
    text = to_text(summary_of(*priced), prices)
    assert max(map(len, text.splitlines())) <= 110
    assert "[unbounded]" in text


LABELS = ("refund or exchange of a damaged item", "where is my order", "delivery", "account", "payment", "returns", "x")


@pytest.mark.parametrize("width", [80, 110, 200])
def test_titles_are_whole_and_every_class_is_shown(make_run: Make, width: int) -> None:
    lines = [line | {"gold": LABELS[k % 7], "student_answer": LABELS[k % 7]} for k, line in enumerate(perfect(70))]
    run = make_run(("answer",), 1.0, student={"num_examples": 70}, predictions=lines)
    text = to_text(summary_of(run), width=width)
    assert max(len(line) for line in text.splitlines() if not line.startswith("python -m")) <= min(width, 110)
    assert "…" not in text
    words = set(text.split())
    for title in (*LABELS, "acc. % [95 %]", "params", "ms/ex.", "recall by class", "1000 to teacher", "evaluate"):
        assert set(title.split()) <= words, title


def test_a_split_table_repeats_its_labels(make_run: Make) -> None:
    text = to_text(summary_of(make_run(("answer",))), width=80)
    tables = [table for table in text.split("\n\n") if table.startswith("model")]
    assert len(tables) == 2
    for label in ("teacher", "student before training", "student on labels alone"):
        assert all(set(label.split()) <= set(table.split()) for table in tables)
    columns = ("acc. % [95 %]", "gen. %", "agree %", "KL", "ECE", "params", "size", "ms/ex.", "train")
    assert [sum(title in table.splitlines()[0] for table in tables) for title in columns] == [1] * 9


def test_the_width_is_that_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "87")
    assert terminal_width() == 87


def perfect(number: int) -> list[dict[str, Any]]:
    return [prediction(k, is_correct=True, agrees=True) for k in range(number)]
