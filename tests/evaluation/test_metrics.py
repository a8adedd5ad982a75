"""What is measured on predictions."""

from __future__ import annotations

import math

import pytest

from distill.evaluation.metrics import wilson_interval


@pytest.mark.parametrize(("right", "number"), [(0, 7), (1, 1), (17, 200), (24_000, 25_000)])
def test_the_ends_of_the_wilson_interval_are_those_at_which_the_score_test_is_just_passed(
    right: int, number: int
) -> None:
    low, high = wilson_interval(right, number)
    assert 0 <= low < high <= 1
    for end, is_at_the_edge in ((low, right == 0), (high, right == number)):
        score = abs(right / number - end) / math.sqrt(end * (1 - end) / number) if 0 < end < 1 else None
        assert score is None if is_at_the_edge else score == pytest.approx(1.959964, abs=1e-6)
