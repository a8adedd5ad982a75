"""Statistics against closed forms, slower implementations, and coverage of a known truth."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from distill.reports import statistics

Matrix = NDArray[np.float64]


def rows(*values: tuple[float, ...]) -> Matrix:
    return np.array(values, np.float64)


def experiment(generator: np.random.Generator, num_seeds: int, seed_spread: float, num_examples: int = 300) -> Matrix:
    """Correctness of two arms [arm, seed, example]: hardness of examples is shared, shifts by seed are not."""
    hard_E = generator.normal(1, 1.5, num_examples)
    shift_AS = generator.normal(0, seed_spread, (2, num_seeds, 1)) + rows((0.3,), (0,))[..., None]
    chance = 1 / (1 + np.exp(-(hard_E + shift_AS)))
    return (generator.random(chance.shape) < chance).astype(np.float64)


def true_difference(seed_spread: float) -> float:
    """Expected difference of `experiment`: its integral over hardness and seeds together (both normal)."""
    z, weight = np.polynomial.hermite_e.hermegauss(60)
    latent = 1 + math.hypot(1.5, seed_spread) * z
    left, right = (1 / (1 + np.exp(-(latent + shift))) for shift in (0.3, 0.0))
    return float((weight * (left - right)).sum() / weight.sum())


@pytest.mark.parametrize(
    ("level", "freedom", "quantile"),
    [
        (0.95, 1, 12.7062), (0.95, 2, 4.3027), (0.95, 3, 3.1824), (0.95, 9, 2.2622), (0.95, 30, 2.0423),
        (0.99, 1, 63.6567), (0.99, 2, 9.9248), (0.99, 10, 3.1693), (0.9, 5, 2.0150), (0.95, 1000, 1.9623),
    ],
)  # fmt: skip
def test_t_quantiles_match_printed_tables(level: float, freedom: int, quantile: float) -> None:
    assert statistics.student_t(level, freedom) == pytest.approx(quantile, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("num_seeds", [3, 10])
@pytest.mark.parametrize("seed_spread", [0.0, 0.3])
def test_the_interval_covers_the_true_difference_at_its_level(num_seeds: int, seed_spread: float) -> None:
    generator, truth = np.random.default_rng(num_seeds), true_difference(seed_spread)
    intervals = [
        statistics.paired_interval(*experiment(generator, num_seeds, seed_spread), num_draws=1000)
        for _ in range(200 if num_seeds > 3 else 400)
    ]
    assert np.mean([interval.low <= truth <= interval.high for interval in intervals]) >= 0.92
    assert np.mean([interval.estimate for interval in intervals]) == pytest.approx(truth, abs=0.02)


def test_the_bootstrap_matches_one_that_draws_every_seed_and_example() -> None:
    generator = np.random.default_rng(1)
    base = generator.integers(-1, 2, 60).astype(np.float64)
    values = np.stack([generator.permutation(base) for _ in range(4)])  # equal seeds: t has no width
    slow = [
        values[np.ix_(generator.integers(0, 4, 4), generator.integers(0, 60, 60))].mean()  # every cell, looked up
        for _ in range(8000)
    ]
    interval = statistics.paired_interval(values, np.zeros_like(values))
    assert interval.estimate == pytest.approx(base.mean())
    assert (interval.low, interval.high) == pytest.approx(np.quantile(slow, [0.025, 0.975]), abs=0.012)
    assert interval.error == pytest.approx(np.std(slow), rel=0.04)


def test_with_more_spread_between_seeds_student_t_decides() -> None:
    left = np.repeat(rows((0.1,), (0.2,), (0.3,)), 40, axis=1)  # all examples equal
    interval = statistics.paired_interval(left, np.zeros_like(left))
    half = 4.3027 * 0.1 / math.sqrt(3)
    assert interval[:3] == pytest.approx((0.2, 0.2 - half, 0.2 + half), abs=1e-5)
    assert (interval.num_seeds, interval.num_examples) == (3, 40)


def test_two_seeds_have_one_degree_of_freedom() -> None:
    left = np.repeat(rows((0.1,), (0.3,)), 40, axis=1)
    interval = statistics.paired_interval(left, np.zeros_like(left))
    half = 12.7062 * 0.1  # t(0.975; 1) times sd/sqrt(2)
    assert interval[:3] == pytest.approx((0.2, 0.2 - half, 0.2 + half), abs=1e-4)


def test_with_one_seed_only_examples_are_resampled() -> None:
    left = np.random.default_rng(2).integers(0, 2, (1, 2000)).astype(np.float64)
    interval = statistics.paired_interval(left, np.zeros_like(left))
    half = 1.96 * left.std(ddof=1) / math.sqrt(2000)
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.05)
    assert interval.num_seeds == 1


def test_examples_that_are_hard_for_both_arms_do_not_widen_the_interval() -> None:
    hard = np.tile(np.arange(400) % 2, (3, 1)).astype(np.float64)
    shuffled = np.random.default_rng(0).permutation(hard, axis=1)
    paired, unpaired = (statistics.paired_interval(hard, other) for other in (hard, shuffled))
    assert -paired.low == pytest.approx(paired.high)
    assert paired.high - paired.low < 0.02  # z²/(400 + z²) to each side, though no pair differs
    assert unpaired.high - unpaired.low > 0.1


def test_swapping_the_sides_negates_the_interval_and_draws_are_reproducible() -> None:
    left, right = experiment(np.random.default_rng(3), 3, 0.2)
    forward, backward = statistics.paired_interval(left, right), statistics.paired_interval(right, left)
    assert (forward.low, forward.high) == pytest.approx((-backward.high, -backward.low))
    assert forward == statistics.paired_interval(left, right)


def test_a_larger_family_is_judged_at_a_higher_level() -> None:
    assert statistics.family_level(0.95, 1) == pytest.approx(0.95)
    assert statistics.family_level(0.95, 5) == pytest.approx(0.99)
    left, right = experiment(np.random.default_rng(4), 3, 0.2)
    narrow, wide = (statistics.paired_interval(left, right, level=level) for level in (0.95, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_without_a_comparison_a_family_keeps_its_level() -> None:
    assert statistics.family_level(0.95, 0) == pytest.approx(0.95)


def test_unless_told_otherwise_an_interval_has_95_percent_10_000_draws_and_a_fixed_seed() -> None:
    left, right = experiment(np.random.default_rng(8), 2, 0.2, 60)
    settings: dict[str, Any] = {"level": 0.95, "num_draws": 10_000, "seed": 0}
    assert statistics.paired_interval(left, right) == statistics.paired_interval(left, right, **settings)
    both = (right, left, np.ones_like(left))
    assert statistics.recovered(*both) == statistics.recovered(*both, **settings)
    points = [1.0, 2.0, 4.0], [1.0, 0.5, 0.5]
    assert statistics.fit_power_law(*points) == statistics.fit_power_law(*points, level=0.95)


def test_a_report_on_the_same_runs_has_the_same_figures_as_ever() -> None:
    """Recorded; to be recorded again only where the draws are meant to change."""
    left, right = (np.stack([np.roll(np.arange(70) ** 2 % n < 2, s) for s in range(3)]).astype(float) for n in (3, 5))
    interval = statistics.paired_interval(left, right, num_draws=2500, level=0.6)
    assert interval[:4] == pytest.approx((0.4, 0.36666666666667, 0.42857142857143, 0.04202634932447), abs=1e-12)


# --- share of the teacher's advantage -----------------------------------------------------------------------


def test_between_a_perfect_teacher_and_a_baseline_without_hits_the_share_is_the_accuracy() -> None:
    arm = experiment(np.random.default_rng(5), 3, 0.2)[0]
    zeros, ones = np.zeros_like(arm), np.ones_like(arm)
    share = statistics.recovered(zeros, arm, ones)
    assert share is not None
    assert share[:4] == pytest.approx(statistics.paired_interval(arm, zeros)[:4])
    assert share.estimate == pytest.approx(arm.mean())


def test_half_of_the_advantage_is_a_share_of_one_half() -> None:
    generator = np.random.default_rng(6)
    baseline, arm, teacher = ((generator.random((2, 4000)) < p).astype(np.float64) for p in (0.5, 0.7, 0.9))
    share = statistics.recovered(baseline, arm, teacher)
    assert share is not None
    assert share.estimate == pytest.approx(0.5, abs=0.05)
    assert share.low < 0.5 < share.high


def test_a_teacher_no_better_than_the_baseline_has_nothing_to_recover() -> None:
    ones = np.ones((2, 10))
    assert statistics.recovered(ones, ones, ones) is None
    assert statistics.recovered(ones, ones, 0 * ones) is None


def test_the_share_of_an_advantage_that_is_not_shown_is_unbounded() -> None:
    baseline = rows((0, 0, 0, 1, 1, 1, 0, 1))
    teacher = rows((0, 1, 1, 1, 0, 1, 0, 1))
    share = statistics.recovered(baseline, baseline, teacher)
    assert share is not None
    assert (share.estimate, share.low, share.high) == (0, -math.inf, math.inf)


def test_the_share_over_seeds_is_linearized_at_its_estimate() -> None:
    gain, advantage = (
        np.repeat(rows(*((x,) for x in column)), 40, axis=1) for column in ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    )
    share = statistics.recovered(0 * gain, gain, advantage)
    assert share is not None
    # Gain less 0.4 of the advantage: -0.06, 0, 0.06; over the mean advantage of 0.5: -0.12, 0, 0.12.
    half = 4.3027 * 0.12 / math.sqrt(3)
    assert share[:3] == pytest.approx((0.4, 0.4 - half, 0.4 + half), abs=1e-4)


# --- power, cost, scaling -----------------------------------------------------------------------------------


def test_the_detectable_difference_is_shown_four_times_out_of_five() -> None:
    generator, num_examples = np.random.default_rng(7), 400
    flat = statistics.paired_interval(
        (generator.random((1, num_examples)) < 0.5).astype(np.float64), np.full((1, num_examples), 0.5)
    )
    shift = statistics.detectable(flat)
    assert shift == pytest.approx(2.8 * 0.5 / math.sqrt(num_examples), rel=0.05)
    shown = [
        statistics.paired_interval(
            (generator.random((1, num_examples)) < 0.5 + shift).astype(np.float64),
            np.full((1, num_examples), 0.5),
            num_draws=1000,
        ).low
        > 0
        for _ in range(400)
    ]
    assert np.mean(shown) == pytest.approx(0.8, abs=0.06)


def test_the_detectable_difference_is_half_the_width_and_the_quantile_of_80_percent() -> None:
    interval = statistics.Interval(0.1, -0.3, 0.5, 0.2, 3, 9)
    assert statistics.detectable(interval) == pytest.approx(0.4 + 0.2 * 0.8416212, abs=1e-6)


def test_break_even_is_the_total_over_the_savings_per_request() -> None:
    assert statistics.break_even(100.0, 0.75, 0.25) == 200
    assert statistics.break_even(100.0, 0.25, 0.25) is None
    assert statistics.break_even(100.0, 0.25, 0.75) is None


def test_an_exact_power_law_is_recovered() -> None:
    law = statistics.fit_power_law([10.0, 100.0, 1e3, 1e4], [2.0 * x**-0.35 for x in (10, 100, 1e3, 1e4)])
    assert law == pytest.approx((2.0, 0.35, 0.35, 0.35))


def test_the_exponents_interval_matches_the_jackknife() -> None:
    # log2 x = 0, 1, 2 and log2 error = 0, -1, -1: slope -1/2. Left out in turn the slopes are 0, -1/2 and -1.
    law = statistics.fit_power_law([1.0, 2.0, 4.0], [1.0, 0.5, 0.5])
    assert law is not None
    half = 12.7062 * math.sqrt(2 / 3 * 0.5)
    assert (law.exponent, law.low, law.high) == pytest.approx((0.5, 0.5 - half, 0.5 + half), abs=1e-4)


@pytest.mark.parametrize(
    ("x", "error"),
    [
        ([1.0, 2.0, 2.0], [0.3, 0.2, 0.1]),
        ([1.0, 2.0, 3.0], [0.3, 0.2, 0.0]),
        ([0.0, 2.0, 3.0], [0.3, 0.2, 0.1]),
    ],
)
def test_too_few_points_or_a_zero_error_give_no_power_law(x: list[float], error: list[float]) -> None:
    assert statistics.fit_power_law(x, error) is None


def test_bins_of_the_teachers_confidence_have_both_accuracies() -> None:
    lines = [(0.55, True, False), (0.58, False, False), (1.0, True, True), (None, True, True), (0.9, None, True)]
    keys = ("teacher_confidence", "is_teacher_correct", "is_correct")
    bins = statistics.by_confidence([dict(zip(keys, line, strict=True)) for line in lines])
    assert [tuple(part) for part in bins] == [(0.5, 0.6, 2, 0.5, 0.0), (0.9, 1.0, 1, 1.0, 1.0)]
    assert statistics.by_confidence([]) == []


def test_the_calibration_error_is_the_mean_gap_of_ten_bins() -> None:
    confidence, is_correct = [0.95, 0.91, 0.35, 0.35], [True, False, False, True]
    # |1 + 0 - 1.86| in the last bin and |0 + 1 - 0.7| in the fourth, of four answers
    assert statistics.calibration_error(confidence, is_correct) == pytest.approx((0.86 + 0.3) / 4)


def test_a_point_is_dominated_if_another_is_nowhere_worse_and_somewhere_better() -> None:
    points = [(0.9, 100.0, 10.0), (0.8, 50.0, 5.0), (0.8, 60.0, 5.0), (0.7, 70.0, 1.0), (0.8, 50.0, 5.0)]
    assert statistics.pareto(points) == [True, True, False, True, True]
    assert statistics.pareto([]) == []


def test_the_explained_share_matches_the_analysis_of_variance() -> None:
    # Means 1 and 5 around 3: 20 in all, of which 4 within; 1 - 4/20 · 3/2.
    for unit in (1.0, 0.01, 1e-5):
        assert statistics.explained([[0.0, 2 * unit], [4 * unit, 6 * unit]]) == pytest.approx(0.7)
    generator = np.random.default_rng(0)
    groups = [generator.normal(k, 1, size) for k, size in enumerate((5, 3, 8))]
    whole = np.concatenate(groups)
    between = sum(len(group) * (group.mean() - whole.mean()) ** 2 for group in groups)
    within = sum(group.var() * len(group) for group in groups) / (16 - 3)
    share = (between - 2 * within) / (between + 13 * within)
    assert 0.1 < share < 0.9
    assert statistics.explained([group.tolist() for group in groups]) == pytest.approx(share)


@pytest.mark.parametrize(
    "groups", [[[1.0], [2.0], [3.0]], [[1.0, 1.0], [1.0]], [[0.0, 2.0], [1.0, 1.0]], [[0.1] * 3] * 2, []]
)
def test_groups_of_one_value_or_with_equal_means_explain_nothing(groups: list[list[float]]) -> None:
    assert statistics.explained(groups) == 0


def test_statistics_do_not_import_torch() -> None:
    code = "import distill.reports.statistics, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
