"""The tables for a terminal fit its width."""

from __future__ import annotations

from distill.reports.text import to_text
from tests.reports.conftest import Make, answers, summary_of, with_latency


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
