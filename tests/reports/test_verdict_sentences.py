"""The whole of what is said about an arm, for every kind of comparison."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from distill.reports.differences import ONE_SEED
from distill.reports.statistics import Interval
from distill.reports.verdicts import share_text
from tests.reports.conftest import Make, summary_of

WITHOUT: dict[str, Any] = {"without": ("predictions.jsonl",)}
OWN = "The arms share no predictions of a seed and test example, so their own 95 % intervals are compared."
SAID: list[tuple[float, float, int, dict[str, Any], str, tuple[str, ...]]] = [
    (
        0.6,
        0.8,
        1,
        {},
        "kl is better in one seed: 20.0 points above labels alone at equal budget (80.0 % [76.5, 83.5] versus 60.0 % "
        "[55.7, 64.3]). The 95 % interval of the difference is +14.4 to +25.4 points (paired by 500 test examples). "
        "It recovers 91 % [71, 116] of the teacher's advantage.",
        (ONE_SEED,),
    ),
    (
        0.6,
        0.8,
        3,
        {},
        "kl is better: 20.0 points above labels alone at equal budget (80.0 ± 0.0 % [76.3, 83.3] versus 60.0 ± 0.0 % "
        "[55.6, 64.2]). The 95 % interval of the difference is +15.8 to +24.1 points (paired by 3 seeds and 500 test "
        "examples). It recovers 91 % [74, 112] of the teacher's advantage.",
        (),
    ),
    (
        0.7,
        0.71,
        2,
        {},
        "kl: 1.0 points above labels alone at equal budget (71.0 ± 0.0 % [66.9, 74.8] versus 70.0 ± 0.0 % [65.8, "
        "73.9]). The 95 % interval of the difference is -3.9 to +6.0 points, which includes 0 (paired by 2 seeds and "
        "500 test examples). This does not show that the student is better. With so few seeds, even a true difference "
        "of 7.0 points would often be missed. It recovers 8 % [-44, 43] of the teacher's advantage.",
        (),
    ),
    (
        0.7,
        0.6,
        1,
        {},
        "kl is worse: 10.0 points below labels alone at equal budget (60.0 % [55.7, 64.3] versus 70.0 % [66.0, 74.0]). "
        "The 95 % interval of the difference is -16.0 to -4.0 points (paired by 500 test examples). It recovers -83 % "
        "[-219, -26] of the teacher's advantage.",
        (ONE_SEED,),
    ),
    (
        0.85,
        0.83,
        1,
        {},
        "kl: 2.0 points below labels alone at equal budget (83.0 % [79.7, 86.3] versus 85.0 % [81.9, 88.1]). The 95 % "
        "interval of the difference is -6.6 to +2.6 points, which includes 0 (paired by 500 test examples). The "
        "student is not better. This data would show a true difference of 6.6 points four times out of five. The "
        "teacher is no better than labels alone.",
        (ONE_SEED,),
    ),
    (
        0.6,
        0.8,
        1,
        WITHOUT,
        "kl is better in one seed: 20.0 points above labels alone at equal budget (80.0 % [76.5, 83.5] versus 60.0 % "
        "[55.7, 64.3]). The 95 % intervals do not overlap.",
        (OWN, ONE_SEED),
    ),
    (
        0.7,
        0.71,
        1,
        WITHOUT,
        "kl: 1.0 points above labels alone at equal budget (71.0 % [67.0, 75.0] versus 70.0 % [66.0, 74.0]), but the "
        "95 % intervals overlap. This does not show that the student is better.",
        (OWN, ONE_SEED),
    ),
]


@pytest.mark.parametrize(("labels", "distilled", "num_seeds", "changes", "sentence", "caveats"), SAID)
def test_a_verdict_says_this_and_no_more(
    labels: float,
    distilled: float,
    num_seeds: int,
    changes: dict[str, Any],
    sentence: str,
    caveats: tuple[str, ...],
    make_run: Make,
) -> None:
    arms: list[tuple[tuple[str, ...], float, dict[str, Any]]] = [
        (("answer",), labels, {}),
        (("kl",), distilled, changes),
    ]
    folders = [make_run(losses, p, seed, **more) for losses, p, more in arms for seed in range(num_seeds)]
    (verdict,) = summary_of(*folders).verdicts
    assert verdict.sentence == sentence
    assert verdict.caveats == caveats


def test_two_comparisons_are_a_family(make_run: Make) -> None:
    arms = ((("answer",), 0.6), (("answer", "kl"), 0.75), (("answer", "rationale"), 0.7))
    for verdict in summary_of(*(make_run(losses, p) for losses, p in arms)).verdicts:
        assert "97.5 % for each of the 2 comparisons, so 95 % for all together" in verdict.sentence


def test_a_verdict_over_the_teachers_answers_alone_says_this_and_no_more(make_run: Make) -> None:
    arms = ((("answer",), 0.6), (("answer", "teacher_answer"), 0.7), (("answer", "kl"), 0.75))
    soft, hard = summary_of(*(make_run(losses, p) for losses, p in arms)).verdicts
    family = "(paired by 500 test examples; 98.3 % for each of the 3 comparisons, so 95 % for all together)"
    assert soft.sentence == (
        "answer + kl is better in one seed: 15.0 points above labels alone at equal budget (75.0 % [71.2, 78.8] versus "
        f"60.0 % [55.7, 64.3]). The 98.3 % interval of the difference is +8.2 to +21.6 points {family}. It recovers "
        "68 % [43, 96] of the teacher's advantage. Against the teacher's answers alone: +5.0 points [-1.8, +11.8], "
        "not shown."
    )
    assert hard.sentence == (
        "answer + teacher_answer is better in one seed: 10.0 points above labels alone at equal budget (70.0 % [66.0, "
        "74.0] versus 60.0 % [55.7, 64.3]). The 98.3 % interval of the difference is +3.0 to +17.0 points "
        f"{family}. It recovers 45 % [17, 72] of the teacher's advantage."
    )


def test_a_share_is_said_with_its_ends_in_whole_percent(make_run: Make) -> None:
    (verdict,) = summary_of(make_run(("answer",), 0.6), make_run(("kl",), 0.8)).verdicts
    assert verdict.difference is not None

    def said(low: float, high: float) -> str:
        assert verdict.difference is not None
        return share_text(replace(verdict.difference, share=Interval(0.5, low, high, 0.1, 1, 100)))

    assert said(-1.0, 3.0) == "50 % [-100, 300]"
    assert said(-float("inf"), 3.0) == said(-1.0, float("inf")) == "50 % [unbounded]"
    assert share_text(replace(verdict.difference, share=None)) == "The teacher is no better than labels alone."
    assert share_text(replace(verdict.difference, share=None, has_teacher=False)) == "not measured"
