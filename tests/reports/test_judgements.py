"""Win rates of judged texts, their intervals, and the check of the judge."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from distill.reports.judgements import CHECK, Judged, judged, verdicts_on_judges
from distill.reports.page import to_html
from distill.reports.text import to_markdown, to_text
from tests.reports.conftest import Make, Page, summary_of


def lines(scores: Sequence[float | None], against: str = "gold", **more: Any) -> list[dict[str, Any]]:
    shared = {"judge": "a judge", "against": against, "is_changed": False, **more}
    return [{**shared, "id": f"{k:032x}", "score": score} for k, score in enumerate(scores)]


def with_judgements(folder: Path, *parts: Sequence[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(line) + "\n" for part in parts for line in part)
    (folder / "judgements.jsonl").write_text(text)
    return folder


def rate(*seeds: Sequence[float | None], make_run: Make) -> Judged:
    runs = [with_judgements(make_run(("answer",), 0.5, n), lines(scores)) for n, scores in enumerate(seeds)]
    (line,) = judged(summary_of(*runs).trained)
    return line


def test_a_tie_is_half_a_win(make_run: Make) -> None:
    line = rate([1] * 30 + [0.5] * 40 + [0] * 30, make_run=make_run)
    assert (line.win_rate, line.ties) == (0.5, 0.4)
    # Wins minus losses have a variance of 0.6, and the win rate a quarter of it.
    assert (line.high - line.low) / 2 == pytest.approx(1.96 * (0.6 / 100 / 4) ** 0.5, rel=0.05)
    assert rate([1] * 60 + [0.5] * 40, make_run=make_run).win_rate == 0.8


def test_the_interval_of_a_certain_win_rate_has_a_width(make_run: Make) -> None:
    line = rate([1] * 12, make_run=make_run)
    assert (line.win_rate, line.high) == (1, 1)
    assert 0.7 < line.low < 0.95


def test_seeds_are_judged_together_on_the_questions_that_all_have(make_run: Make) -> None:
    line = rate([1] * 20 + [None, 0], [0.5] * 20 + [1, 0], make_run=make_run)
    assert (line.num_pairs, line.num_all) == (21, 22)
    assert line.win_rate == pytest.approx((20 * 1 + 20 * 0.5) / 42)
    assert line.cells[-1] == "21 of 22"


def test_a_run_without_judged_pairs_has_no_line(make_run: Make) -> None:
    assert judged(summary_of(with_judgements(make_run(("answer",), 0.5), lines([None, None]))).trained) == []
    assert judged(summary_of(make_run(("answer",), 0.5)).trained) == []


@pytest.mark.parametrize(("num_right", "is_able"), [(40, True), (37, True), (30, False), (20, False)])
def test_a_judge_must_clearly_prefer_the_right_reference_text(num_right: int, is_able: bool, make_run: Make) -> None:
    check = lines([1] * num_right + [0] * (40 - num_right), CHECK)
    arms = summary_of(
        with_judgements(make_run(("answer",), 0.5), lines([1] * 40), check),
        with_judgements(make_run(("answer", "kl"), 0.5), lines([0] * 40), check),
    ).trained
    found = judged(arms)
    assert [line.against for line in found].count(CHECK) == 1  # the texts are those of the same questions
    (sentence,) = verdicts_on_judges(found)
    assert ("its win rates show nothing" not in sentence) == is_able


def test_the_report_has_the_judgements(make_run: Make) -> None:
    changed = lines([0.5] * 8, is_changed=True)
    summary = summary_of(
        with_judgements(make_run(("answer",), 0.5), lines([1, 0], "teacher"), changed, lines([1] * 20, CHECK))
    )
    for text in (to_text(summary), to_markdown(summary), Page(to_html(summary)).text):
        joined = " ".join(text.replace("\\", "").split())
        assert "order changed" in joined
        assert "the teacher's texts" in joined
        assert "this judge can tell so coarse a difference" in joined
