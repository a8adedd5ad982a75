"""A difference is shown if its interval lies on one side of 0, however near."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from distill.reports.arms import Arm
from distill.reports.differences import ONE_SEED, Difference, compare, interval_title, percent
from distill.reports.statistics import Interval, recovered
from distill.reports.verdicts import share_text
from tests.reports.conftest import Make, answers, shuffled, summary_of

ARM = Arm("distilled", "", {}, (), ({"accuracy": 0.5, "num_examples": 100, "interval": [0.4, 0.6]},))


def difference(low: float, high: float, num_seeds: int = 3) -> Difference:
    interval = Interval((low + high) / 2, low, high, 0.01, num_seeds, 100)
    return Difference(ARM, ARM, 0.95, 1, interval, None, False, ())


@pytest.mark.parametrize(
    ("low", "high", "status"),
    [
        (0.0001, 0.03, "better"),
        (0.0, 0.03, "not shown"),
        (-0.0001, 0.03, "not shown"),
        (-0.009, 0.03, "not shown"),
        (-0.03, 0.009, "not shown"),
        (-0.03, 0.0001, "not shown"),
        (-0.03, 0.0, "not shown"),
        (-0.03, -0.0001, "worse"),
    ],
)
def test_a_difference_is_shown_only_if_its_interval_excludes_0(low: float, high: float, status: str) -> None:
    assert difference(low, high).status == status
    one_seed = difference(low, high, num_seeds=1)
    assert one_seed.wording == ("better in one seed" if status == "better" else status)


@pytest.mark.parametrize(
    ("mine", "theirs", "status"),
    [
        ((0.60, 0.70), (0.50, 0.60), "not shown"),
        ((0.61, 0.70), (0.50, 0.60), "better"),
        ((0.40, 0.50), (0.50, 0.60), "not shown"),
        ((0.40, 0.49), (0.50, 0.60), "worse"),
    ],
)
def test_unpaired_arms_differ_if_their_intervals_do_not_touch(
    mine: tuple[float, float], theirs: tuple[float, float], status: str
) -> None:
    arm, rival = (Arm("distilled", "", {}, (), ({"accuracy": 0.5, "interval": ends},)) for ends in (mine, theirs))
    assert Difference(arm, rival, 0.95, 1, None, None, False, ()).status == status


def test_a_level_has_three_digits() -> None:
    assert [percent(level) for level in (0.95, 1 - 0.05 / 3, 1 - 0.05 / 28)] == ["95 %", "98.3 %", "99.8 %"]


def test_a_heading_names_each_level_once() -> None:
    levels = [replace(difference(0, 1), level=level) for level in (0.95, 0.99, 0.95)]
    assert interval_title(levels) == "95 %/99 % interval"
    assert interval_title([]) == "95 % interval"


@pytest.mark.parametrize(("mine", "theirs", "is_named"), [(1, 1, True), (1, 2, True), (2, 1, True), (2, 2, False)])
def test_unpaired_arms_of_which_one_has_a_single_seed_are_a_difference_of_one_seed(
    mine: int, theirs: int, is_named: bool
) -> None:
    row = {"accuracy": 0.7, "num_examples": 100, "interval": [0.6, 0.8]}
    arm = Arm("distilled", "", {}, (), ({**row, "accuracy": 0.8},) * mine)
    found = compare(arm, Arm("baseline", "", {}, (), (row,) * theirs), 0.95, 1)
    assert found.has_one_seed == is_named == (ONE_SEED in found.caveats)
    assert (found.ends, found.detectable, found.has_teacher) == (None, None, False)
    assert found.points == pytest.approx(10)


def test_a_share_has_the_level_of_its_comparison(make_run: Make) -> None:
    (verdict,) = summary_of(make_run(("answer",), 0.62), make_run(("kl",), 0.72)).verdicts
    arm, rival = verdict.arm, verdict.difference.rival if verdict.difference else verdict.arm
    narrow, wide = compare(arm, rival, 0.95, 1), compare(arm, rival, 0.95, 5)
    matrices = [np.array([shuffled(p, 500, name)], float) for p, name in ((0.62, "('answer',)0"), (0.72, "('kl',)0"))]
    teacher = np.array([shuffled(0.82, 500, "teacher")], float)
    for found, level in ((narrow, 0.95), (wide, 0.99)):
        assert found.level == pytest.approx(level)
        assert found.share == pytest.approx(recovered(*matrices, teacher, level=found.level))


@pytest.mark.parametrize(("mine", "theirs"), [(2, 2), (3, 2), (2, 3)])
def test_what_is_left_out_of_a_pairing_is_a_caveat_and_nothing_else(make_run: Make, mine: int, theirs: int) -> None:
    sides = ((("answer",), theirs), (("kl",), mine))
    (verdict,) = summary_of(*(make_run(losses, 0.7, seed) for losses, n in sides for seed in range(n))).verdicts
    named = "Paired on seed 0, 1 only: the other seeds lack predictions or a run of the other arm."
    assert verdict.difference is not None
    assert verdict.difference.caveats == (() if mine == theirs else (named,))


def test_predictions_without_the_teachers_correctness_give_no_share(make_run: Make) -> None:
    lines = answers(("kl",), 0.8, 0)
    del lines[3]["teacher_answer"]
    lines[3]["is_teacher_correct"] = None
    (verdict,) = summary_of(make_run(("answer",), 0.6), make_run(("kl",), 0.8, predictions=lines)).verdicts
    assert verdict.difference is not None
    assert (verdict.difference.share, verdict.difference.has_teacher) == (None, False)
    assert share_text(verdict.difference) == "not measured"
    assert "teacher" not in verdict.sentence


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.254, 0.746, "50 % [25, 75]"), (-math.inf, math.inf, "50 % [unbounded]"), (-0.1, 1.2, "50 % [-10, 120]")],
)
def test_a_share_is_written_in_whole_percent(low: float, high: float, expected: str) -> None:
    share = Interval(0.5, low, high, 0.1, 3, 100)
    assert share_text(replace(difference(0.1, 0.2), share=share, has_teacher=True)) == expected
