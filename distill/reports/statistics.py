"""Intervals, recovered shares, break-even points, power laws and Pareto fronts. No files, no models.

Correctness is a matrix of 0 and 1 with a row per seed and a column per test example.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special  # imports in a quarter of the time of scipy.stats; the quantiles are the same

from distill.reports.proportions import exact_interval, normal_quantile, paired_score_interval

Matrix = NDArray[np.float64]

NUM_DRAWS, BLOCK_SIZE = 10_000, 1_000
POWER = 0.8  # of the test in `detectable`
FEW = 25  # examples unlike the others; below, a bootstrap is too narrow and exact intervals are used too


class Interval(NamedTuple):
    """An estimate, the ends of its interval, its standard error, and the numbers of resampled seeds and examples."""

    estimate: float
    low: float
    high: float
    error: float
    num_seeds: int
    num_examples: int


class PowerLaw(NamedTuple):
    """error = factor · x^(-exponent), with an interval of the exponent."""

    factor: float
    exponent: float
    low: float
    high: float


class Bin(NamedTuple):
    """Accuracies on the `num` test examples with a teacher's confidence between `low` and `high`."""

    low: float
    high: float
    num: int
    teacher: float
    student: float


def student_t(level: float, freedom: int) -> float:
    """Return the t with P(|T| < t) = level."""
    return float(special.stdtrit(freedom, (1 + level) / 2))


def linearized_ratio(totals: Sequence[float], numbers: Sequence[float]) -> list[float]:
    """Return a value for each example such that their mean is sum(totals)/sum(numbers), and vary as that does.

    The first-order expansion of a ratio of means (Cochran 1977, "Sampling Techniques", eq. 6.13).
    """
    total_E, number_E = np.asarray(totals, np.float64), np.asarray(numbers, np.float64)
    ratio = total_E.sum() / number_E.sum()
    values: list[float] = (ratio + (total_E - ratio * number_E) / number_E.mean()).tolist()
    return values


def paired_interval(
    left: Matrix,
    right: Matrix,
    *,
    level: float = 0.95,
    num_draws: int = NUM_DRAWS,
    seed: int = 0,
    is_proportion: bool = True,
) -> Interval:
    """Return the interval of mean(left) - mean(right), paired by seed (rows) and test example (columns).

    At each end it is the wider of two intervals. First, the percentiles of the two-way bootstrap (Owen 2007, "The
    pigeonhole bootstrap"): seeds and examples are resampled independently, and a cell counts as often as its seed
    and its example are drawn together. Second, Student's t over the seeds' mean differences, because resampling a
    few seeds underestimates their spread by sqrt((s - 1)/s) and has the tails of the normal distribution. With one
    seed only examples are resampled, and the interval does not include the spread between seeds. Where all
    but fewer than `FEW` examples have the same difference, such as none, it is at least as wide as exact intervals.
    Of values that are not 0 or 1 (`is_proportion` is False), it is at least as wide as Student's t over the examples.
    """
    values_SE = np.asarray(left, np.float64) - np.asarray(right, np.float64)
    draws = _draws(values_SE[..., None], num_draws, seed)[:, 0]
    interval = _wider(draws, values_SE.mean(1), values_SE.shape[1], level)
    ends = few_differences(values_SE, level) if is_proportion else _mean_interval(values_SE.mean(0), level)
    return interval if ends is None else _widened(interval, *ends, level)


def _mean_interval(values_E: NDArray[np.float64], level: float) -> tuple[float, float]:
    """Return the ends of Student's interval of the mean; infinite for one value."""
    mean, number = float(values_E.mean()), len(values_E)
    half = student_t(level, number - 1) * float(values_E.std(ddof=1)) / math.sqrt(number) if number > 1 else math.inf
    return mean - half, mean + half


def few_differences(values_SE: Matrix, level: float) -> tuple[float, float] | None:
    """Return ends of the mean difference where all but fewer than `FEW` examples have the same one; else None.

    That one difference is -1, 0 or 1 on average over seeds. At each end the wider of two. Given the examples that
    differ, the sign of their means over seeds is binomial: with one seed, these ends exclude 0 just where the exact
    McNemar test rejects equality. They have no width if no example differs, hence the score interval at the seeds'
    mean counts.
    """
    mean_E, num_examples = values_SE.mean(0), values_SE.shape[1]
    most_alike = max(int((mean_E == alike).sum()) for alike in (-1, 0, 1))
    if num_examples - most_alike >= FEW:
        return None
    gains, number = int((mean_E > 0).sum()), int((mean_E != 0).sum())
    size = float(np.abs(mean_E).sum()) / num_examples
    exact = [(2 * end - 1) * size for end in exact_interval(gains, number, level)]
    left, right = (float((sign * values_SE > 0).sum(1).mean()) for sign in (1, -1))
    score = paired_score_interval(left, right, num_examples, level)
    return min(exact[0], score[0]), max(exact[1], score[1])


def _widened(interval: Interval, low: float, high: float, level: float) -> Interval:
    low, high = min(interval.low, low), max(interval.high, high)
    error = max(interval.error, (high - low) / 2 / normal_quantile(level))
    return interval._replace(low=low, high=high, error=error)


def recovered(
    baseline: Matrix, arm: Matrix, teacher: Matrix, *, level: float = 0.95, num_draws: int = NUM_DRAWS, seed: int = 0
) -> Interval | None:
    """Return the share of the teacher's advantage over the baseline that the arm has; None without an advantage.

    (arm - baseline)/(teacher - baseline), resampled together as in `paired_interval`; over seeds the ratio is
    linearized at its estimate. If the interval of the teacher's advantage includes 0, that of the share is
    unbounded (Fieller 1954): its ends are infinite. Where few examples differ between arm and baseline, the ends
    are at least those of the gain, as a share of the advantage.
    """
    gain_SE, advantage_SE = (np.asarray(x, np.float64) - np.asarray(baseline, np.float64) for x in (arm, teacher))
    gain, advantage = float(gain_SE.mean()), float(advantage_SE.mean())
    if advantage <= 0:
        return None
    num_seeds, num_examples = gain_SE.shape
    draws = _draws(np.stack([gain_SE, advantage_SE], axis=-1), num_draws, seed)
    few = few_differences(advantage_SE, level)
    if min(_wider(draws[:, 1], advantage_SE.mean(1), num_examples, level).low, few[0] if few else math.inf) <= 0:
        return Interval(gain / advantage, -math.inf, math.inf, math.inf, num_seeds, num_examples)
    shares = draws[draws[:, 1] > 0]
    seeds = (gain_SE - gain / advantage * advantage_SE).mean(1) / advantage + gain / advantage
    interval = _wider(shares[:, 0] / shares[:, 1], seeds, num_examples, level)
    ends = few_differences(gain_SE, level)
    return interval if ends is None else _widened(interval, ends[0] / advantage, ends[1] / advantage, level)


def _draws(values_SEK: NDArray[np.float64], num_draws: int, seed: int) -> Matrix:
    """Return two-way bootstrap draws of the K means, all from the same seeds and examples.

    Examples with equal values are drawn as one kind, which gives the same distribution with far less work.
    """
    num_seeds, num_examples, num_means = values_SEK.shape
    columns = values_SEK.transpose(1, 0, 2).reshape(num_examples, -1)
    kinds, counts = np.unique(columns, axis=0, return_counts=True)
    generator = np.random.default_rng(seed)
    blocks = []
    for start in range(0, num_draws, BLOCK_SIZE):
        size = min(BLOCK_SIZE, num_draws - start)
        seeds_BS = generator.multinomial(num_seeds, [1 / num_seeds] * num_seeds, size) / num_seeds
        examples_BU = generator.multinomial(num_examples, counts / num_examples, size) / num_examples
        means_BSK = (examples_BU @ kinds).reshape(size, num_seeds, num_means)
        blocks.append(np.einsum("bs,bsk->bk", seeds_BS, means_BSK))
    return np.concatenate(blocks)


def _wider(draws: Matrix, seeds: Matrix, num_examples: int, level: float) -> Interval:
    """Return, at each end, the wider of the draws' percentiles and Student's t over the seeds' values."""
    low, high = map(float, np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]))
    mean, error, num_seeds = float(seeds.mean()), float(draws.std(ddof=1)), len(seeds)
    if num_seeds > 1:
        spread = float(seeds.std(ddof=1)) / math.sqrt(num_seeds)
        half = student_t(level, num_seeds - 1) * spread
        low, high, error = min(low, mean - half), max(high, mean + half), max(error, spread)
    return Interval(mean, low, high, error, num_seeds, num_examples)


def family_level(level: float, number: int) -> float:
    """Return the level of each of `number` intervals such that all hold together with `level` (Bonferroni)."""
    return 1 - (1 - level) / max(1, number)


def detectable(interval: Interval) -> float:
    """Return the true difference that such data shows with 80 % power: half-width + 0.84 standard errors.

    2.8 standard errors if the half-width is the normal 1.96; more with few seeds or many arms.
    """
    return (interval.high - interval.low) / 2 + float(special.ndtri(POWER)) * interval.error


def break_even(total: float, teacher_per_request: float, student_per_request: float) -> float | None:
    """Return the requests after which the student has saved its total cost; None if its requests are not cheaper."""
    saved = teacher_per_request - student_per_request
    return total / saved if saved > 0 else None


def fit_power_law(x: Sequence[float], error: Sequence[float], *, level: float = 0.95) -> PowerLaw | None:
    """Fit log error to log x by least squares; None below three distinct x or if a value is not positive.

    The exponent's interval is the jackknife's (leave one out), with t of n - 2 degrees of freedom.
    """
    if len(set(x)) < 3 or min(*x, *error) <= 0:
        return None
    log_x, log_error = np.log(np.asarray(x, np.float64)), np.log(np.asarray(error, np.float64))
    slope, intercept = map(float, np.polyfit(log_x, log_error, 1))
    number = len(log_x)
    others = ~np.eye(number, dtype=bool)
    left_out = np.array([np.polyfit(log_x[keep], log_error[keep], 1)[0] for keep in others])
    spread = math.sqrt((number - 1) / number * float(((left_out - left_out.mean()) ** 2).sum()))
    half = student_t(level, number - 2) * spread
    return PowerLaw(math.exp(intercept), -slope, -slope - half, -slope + half)


def by_confidence(predictions: Sequence[Mapping[str, Any]], *, num_bins: int = 10) -> list[Bin]:
    """Return accuracies of teacher and student in equal bins of the teacher's confidence; empty bins are left out.

    Predictions without a confidence or without the correctness of either are ignored.
    """
    keys = ("teacher_confidence", "is_teacher_correct", "is_correct")
    rows = [[line.get(key) for key in keys] for line in predictions]
    values = np.array([row for row in rows if None not in row], np.float64).reshape(-1, 3)
    return [
        Bin(low, high, len(places), float(values[places, 1].mean()), float(values[places, 2].mean()))
        for low, high, places in confidence_bins(values[:, 0], num_bins=num_bins)
    ]


def calibration_error(confidence: Sequence[float], is_correct: Sequence[bool]) -> float:
    """Return the expected calibration error in ten equal bins (Guo et al. 2017, eq. 3)."""
    gaps = np.asarray(is_correct, np.float64) - np.asarray(confidence, np.float64)
    return math.fsum(abs(float(gaps[places].sum())) for _, _, places in confidence_bins(confidence)) / len(gaps)


def confidence_bins(
    confidence: Sequence[float] | NDArray[np.float64], *, num_bins: int = 10
) -> list[tuple[float, float, NDArray[np.intp]]]:
    """Return the ends of each equal bin of [0, 1] and the indices of its values; empty bins are left out.

    A value on an edge belongs to the upper bin, 1 to the last.
    """
    edges = np.arange(num_bins + 1) / num_bins
    bins = np.digitize(confidence, edges[1:-1])
    return [(float(edges[k]), float(edges[k + 1]), np.flatnonzero(bins == k)) for k in np.unique(bins)]


def explained(groups: Sequence[Sequence[float]]) -> float:
    """Return the share of the variance of all values that the means of their groups explain.

    Kelley 1935, "An unbiased correlation ratio measure": epsilon² = 1 - (1 - eta²)(n - 1)/(n - k) for n values in k
    groups, 0 on average if groups do not matter. Negative values become 0; groups of one value each give 0.
    """
    values = [value for group in groups for value in group]
    freedom = len(values) - len(groups)
    if freedom <= 0 or (total := _squares(values)) < 1e-12:  # equal but for rounding
        return 0.0
    return max(0.0, 1 - math.fsum(map(_squares, groups)) / total * (len(values) - 1) / freedom)


def _squares(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values)


def pareto(points: Sequence[tuple[float, ...]]) -> list[bool]:
    """Mark the points that no other dominates: large first coordinate (accuracy), small others (size, latency)."""
    table = np.array([[-first, *rest] for first, *rest in points], np.float64)
    return [not ((table <= row).all(1) & (table < row).any(1)).any() for row in table]
