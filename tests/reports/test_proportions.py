"""Intervals from counts against scipy, a brute-force likelihood and the tests that they invert."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from distill.reports.proportions import exact_interval, normal_quantile, paired_score_interval, wilson_interval
from distill.reports.statistics import FEW, few_differences, paired_interval, recovered

COUNTS = [(0, 1), (1, 1), (0, 7), (3, 20), (20, 20), (17, 200), (149, 150), (24_000, 25_000)]
LEVELS = [0.9, 0.95, 0.998]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("count", "number"), COUNTS)
def test_intervals_of_one_proportion_match_scipy(count: int, number: int, level: float) -> None:
    reference = stats.binomtest(count, number)
    wilson, exact = (reference.proportion_ci(level, method) for method in ("wilson", "exact"))
    assert wilson_interval(count, number, level) == pytest.approx((wilson.low, wilson.high), abs=1e-9)
    assert exact_interval(count, number, level) == pytest.approx((exact.low, exact.high), abs=1e-9)


def test_the_normal_quantile_is_not_rounded() -> None:
    assert normal_quantile(0.95) == pytest.approx(1.959963984540054, abs=1e-12)


def likelihood(gains: int, losses: int, number: int, difference: float) -> float:
    """Greatest log-likelihood of a trinomial with this difference, by trying every value of the other parameter."""
    right_alone = np.linspace(max(0.0, -difference), (1 - difference) / 2, 200_001)[1:-1]
    left_alone = right_alone + difference
    terms = gains * np.log(left_alone) + losses * np.log(right_alone)
    terms += (number - gains - losses) * np.log(1 - left_alone - right_alone)
    return float(right_alone[np.argmax(terms)])


@pytest.mark.parametrize(("gains", "losses", "number"), [(4, 1, 150), (12, 3, 50), (2, 9, 30)])
def test_the_score_test_is_just_passed_at_the_ends_of_the_paired_interval(gains: int, losses: int, number: int) -> None:
    observed = (gains - losses) / number
    low, high = paired_score_interval(gains, losses, number)
    assert low < observed < high
    for end in (low, high):
        right_alone = likelihood(gains, losses, number, end)
        error = math.sqrt((2 * right_alone + end - end**2) / number)
        assert abs(observed - end) / error == pytest.approx(1.959964, abs=1e-3)


def test_without_a_pair_that_differs_the_paired_interval_has_a_width() -> None:
    low, high = paired_score_interval(0, 0, 150)
    assert high == pytest.approx(1.959964**2 / (150 + 1.959964**2), abs=1e-6)
    assert low == pytest.approx(-high, abs=1e-6)
    assert paired_score_interval(4, 0, 150) == pytest.approx([-end for end in paired_score_interval(0, 4, 150)][::-1])


def pairs(gains: int, losses: int, number: int = 150) -> tuple[np.ndarray, np.ndarray]:
    left, right = np.zeros((1, number)), np.zeros((1, number))
    left[0, :gains] = right[0, gains : gains + losses] = 1
    return left, right


@pytest.mark.parametrize("number", range(1, FEW))
def test_a_difference_is_shown_with_few_pairs_only_if_the_exact_test_rejects_equality(number: int) -> None:
    for gains in range(number + 1):
        interval = paired_interval(*pairs(gains, number - gains), num_draws=200)
        is_shown = interval.low > 0 or interval.high < 0
        assert not is_shown or stats.binomtest(gains, number).pvalue < 0.05, gains
    # All on one side: five pairs have p = 0.0625, six p = 0.03125.
    assert (paired_interval(*pairs(number, 0)).low > 0) == (number > 5)


def test_four_pairs_that_all_favour_one_side_show_nothing() -> None:
    interval = paired_interval(*pairs(4, 0))
    assert interval.low < 0 < interval.estimate < interval.high
    assert interval.low == pytest.approx(4 / 150 * (2 * 0.025 ** (1 / 4) - 1))  # Clopper and Pearson of 4 in 4


@pytest.mark.parametrize("num_seeds", [1, 3])
@pytest.mark.parametrize("gains", [150, 149, 126])
def test_where_nearly_all_pairs_favour_one_side_the_interval_has_a_width(gains: int, num_seeds: int) -> None:
    """At 150 of 150 the score interval ends at (n - z²)/(n + z²), and a bootstrap has no width at all."""
    left, right = (np.repeat(side, num_seeds, 0) for side in pairs(gains, 0))
    for sign, interval in ((1, paired_interval(left, right)), (-1, paired_interval(right, left))):
        near, far = sorted((sign * interval.low, sign * interval.high))
        assert near < gains / 150
        assert near <= paired_score_interval(gains, 0, 150)[0] + 1e-12
        assert far >= paired_score_interval(gains, 0, 150)[1] - 1e-12
        assert interval.error > 0.005
    unanimous = paired_interval(*pairs(150, 0))
    assert unanimous[:3] == pytest.approx((1, (150 - 1.959964**2) / (150 + 1.959964**2), 1), abs=1e-6)


def test_the_recovered_share_of_no_gain_has_a_width() -> None:
    zeros, ones = np.zeros((1, 150)), np.ones((1, 150))
    share = recovered(zeros, zeros, ones)
    assert share is not None
    assert share[:3] == pytest.approx((0, -0.02497, 0.02497), abs=1e-4)


def test_equal_seeds_without_a_difference_have_an_interval_with_a_width() -> None:
    right = np.ones((2, 20))
    interval = paired_interval(right, right)
    assert interval.high == pytest.approx(-interval.low) == pytest.approx(0.1611, abs=1e-3)
    assert interval.error > 0.05


@pytest.mark.parametrize("number", [1, 3, 7, 20, 49, 150, 977])
def test_an_interval_of_a_proportion_ends_exactly_at_0_and_at_1(number: int) -> None:
    for interval in (wilson_interval, exact_interval):
        assert interval(0, number)[0] == 0
        assert interval(number, number)[1] == 1


def test_an_interval_has_a_level_of_95_percent_unless_another_is_given() -> None:
    assert wilson_interval(3, 20) == wilson_interval(3, 20, 0.95) != wilson_interval(3, 20, 0.9)
    assert exact_interval(3, 20) == exact_interval(3, 20, 0.95) != exact_interval(3, 20, 0.9)
    assert paired_score_interval(3, 1, 20) == paired_score_interval(3, 1, 20, 0.95)


@pytest.mark.parametrize(("number", "level"), [(1, 0.95), (1, 0.2), (30, 0.998), (3, 0.05)])
def test_the_paired_interval_of_equal_pairs_is_the_closed_form_at_every_level(number: int, level: float) -> None:
    z2 = float(stats.norm.ppf((1 + level) / 2)) ** 2
    assert paired_score_interval(0, 0, number, level) == pytest.approx((-z2 / (number + z2), z2 / (number + z2)))


def test_examples_that_differ_are_few_below_25() -> None:
    assert few_differences(np.subtract(*pairs(12, 12)), 0.95) is not None
    assert few_differences(np.subtract(*pairs(12, 13)), 0.95) is None
    assert few_differences(np.subtract(*pairs(126, 0)), 0.95) is not None  # 24 are unlike the others
    assert few_differences(np.subtract(*pairs(125, 0)), 0.95) is None


@pytest.mark.parametrize("level", [0.9, 0.99])
@pytest.mark.parametrize("cells", [[(1, 1)] * 4 + [(1, -1)], [(1, 1)] * 9 + [(0, -1)], [(1, 0), (-1, -1), (-1, 1)]])
def test_the_ends_of_few_differences_are_counted_example_by_example(cells: list[tuple[int, int]], level: float) -> None:
    """A column has the differences of an example with two seeds; the other 100 examples have none."""
    signs = [left + right for left, right in cells if left + right]
    low, high = stats.binomtest(sum(sign > 0 for sign in signs), len(signs)).proportion_ci(level)
    size = sum(abs(sign) / 2 for sign in signs) / 100
    gains, losses = (sum(cell.count(side) for cell in cells) / 2 for side in (1, -1))
    score = paired_score_interval(gains, losses, 100, level)
    values = np.array(cells + [(0, 0)] * (100 - len(cells)), np.float64).T
    expected = min((2 * low - 1) * size, score[0]), max((2 * high - 1) * size, score[1])
    assert few_differences(values, level) == pytest.approx(expected)


def test_the_error_of_an_interval_from_counts_is_its_half_width_in_normal_quantiles() -> None:
    interval = paired_interval(*pairs(0, 0), level=0.99)
    assert interval.error == pytest.approx((interval.high - interval.low) / 2 / 2.5758293)


def test_an_advantage_in_four_examples_alone_leaves_the_recovered_share_unbounded() -> None:
    teacher, baseline = pairs(4, 0)
    share = recovered(baseline, baseline, teacher)
    assert share is not None
    assert (share.low, share.high, share.error) == (-math.inf, math.inf, math.inf)
    assert (share.num_seeds, share.num_examples) == (1, 150)


def test_the_recovered_share_of_no_gain_is_as_wide_as_a_gain_over_the_advantage() -> None:
    teacher, baseline = pairs(75, 0)  # half of 150
    share = recovered(baseline, baseline, teacher)
    assert share is not None
    end = 1.959964**2 / (150 + 1.959964**2)
    assert share[:3] == pytest.approx((0, -2 * end, 2 * end), abs=1e-6)
