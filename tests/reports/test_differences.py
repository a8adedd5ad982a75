"""A difference is shown if its interval lies on one side of 0, however near."""

from __future__ import annotations

import pytest

from distill.reports.arms import Arm
from distill.reports.differences import Difference, percent
from distill.reports.statistics import Interval

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
