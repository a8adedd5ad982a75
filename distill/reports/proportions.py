"""Intervals from counts that hold at 0 %, at 100 % and with few pairs, where the normal approximation has no width."""

from __future__ import annotations

import math
from collections.abc import Callable

from scipy import special  # imports in a quarter of the time of scipy.stats; the quantiles are the same


def normal_quantile(level: float) -> float:
    """Return the z with P(|Z| < z) = level; 1.96 for 95 %."""
    return float(special.ndtri((1 + level) / 2))


def wilson_interval(right: int | float, number: int | float, level: float = 0.95) -> tuple[float, float]:
    """Score interval of the proportion `right` of `number` (Wilson 1927, eq. 1); means of counts need not be whole."""
    share, z2 = right / number, normal_quantile(level) ** 2
    middle = (share + z2 / (2 * number)) / (1 + z2 / number)
    half = math.sqrt(z2 * (share * (1 - share) / number + z2 / (4 * number**2))) / (1 + z2 / number)
    # At 0 % and 100 % the ends are exact; rounding would leave them beside the observed share.
    return (0.0 if right <= 0 else middle - half), (1.0 if right >= number else middle + half)


def exact_interval(count: int, number: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of a proportion that inverts the exact binomial test (Clopper and Pearson 1934); (0, 1) of none."""
    tail = (1 - level) / 2
    low = float(special.betaincinv(count, number - count + 1, tail)) if count else 0.0
    high = float(special.betaincinv(count + 1, number - count, 1 - tail)) if count < number else 1.0
    return low, high


def paired_score_interval(
    gains: int | float, losses: int | float, number: int, level: float = 0.95
) -> tuple[float, float]:
    """Score interval of the difference of two paired proportions (Tango 1998, "Equivalence test", eq. 14).

    Of `number` pairs, `gains` are right on the left side alone and `losses` on the right side alone. Without either,
    the ends are ±z²/(n + z²).
    """
    z, observed = normal_quantile(level), (gains - losses) / number

    def score(difference: float) -> float:
        """(Observed - difference) in standard errors, with the maximum likelihood of the nuisance parameter."""
        slope = (2 * number - gains + losses) * difference - gains - losses
        root = slope**2 + 8 * number * losses * difference * (1 - difference)
        right_alone = (math.sqrt(max(0.0, root)) - slope) / (4 * number)
        variance = (2 * right_alone + difference * (1 - difference)) / number
        return (observed - difference) / math.sqrt(max(variance, 1e-300))

    return (
        _crossing(lambda difference: score(difference) > z, -1.0, observed),
        _crossing(lambda difference: score(difference) >= -z, observed, 1.0),
    )


def _crossing(is_below: Callable[[float], bool], low: float, high: float) -> float:
    """Return the place between `low` and `high` up to which `is_below` holds."""
    while low < (middle := (low + high) / 2) < high:  # until no number lies between
        low, high = (middle, high) if is_below(middle) else (low, middle)
    return middle
