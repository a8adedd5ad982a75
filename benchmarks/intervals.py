"""Coverage of every interval of a report, and how often one claims a difference that is not there.

`scripts/benchmark intervals`

experiments=2000  simulated per line of paired differences; a fourth of them where an experiment takes longer
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from benchmarks.measure import Row, save
from distill.reports.arms import Arm
from distill.reports.proportions import wilson_interval
from distill.reports.statistics import detectable, family_level, fit_power_law, paired_interval, recovered

Matrix = NDArray[np.float64]
Ends = tuple[float, float] | None

_NUM_DRAWS = 1000
_HARDNESS = 1.0  # standard deviation between examples, in probits
_LEVEL = 0.95
_SLACK = 0.02


@dataclass(frozen=True)
class World:
    """Arms on the same examples, all seeds drawn anew: P(right) = Phi(hardness of the example + shift of the seed).

    An arm is right on a share `accuracy` of all examples and seeds, another on `accuracy + gain`. Their common
    examples, and with `seed_spread` the seeds, make the spread that an interval has to cover.
    """

    accuracy: float
    gain: float
    num_examples: int
    num_seeds: int
    seed_spread: float = 0.0

    def draw(self, generator: np.random.Generator, *accuracies: float) -> list[Matrix]:
        """Return the correctness [seed, example] of an arm for each accuracy."""
        hardness_E = generator.normal(0, _HARDNESS, self.num_examples)
        width = math.sqrt(1 + _HARDNESS**2 + self.seed_spread**2)
        drawn = []
        for accuracy in accuracies:
            shift_S = float(stats.norm.ppf(accuracy)) * width + generator.normal(0, self.seed_spread, self.num_seeds)
            noise_SE = generator.normal(0, 1, (self.num_seeds, self.num_examples))
            drawn.append((hardness_E + shift_S[:, None] + noise_SE > 0).astype(np.float64))
        return drawn

    def __str__(self) -> str:
        """Describe the world."""
        seeds = "1 seed" if self.num_seeds == 1 else f"{self.num_seeds} seeds"
        spread = f" that differ by {self.seed_spread:g}" if self.seed_spread else ""
        return f"{100 * self.accuracy:g} % of {self.num_examples}, {seeds}{spread}"


def main(arguments: Sequence[str]) -> None:
    """Simulate everything and save the figures."""
    options = dict(argument.partition("=")[::2] for argument in arguments)
    if not options.keys() <= {"experiments"}:
        sys.exit(f"{__doc__}\ngot: {' '.join(arguments)}")
    save("intervals", rows(int(options.get("experiments", "2000"))))


def worlds(gain: float) -> list[World]:
    """Return few and many examples at the floor, in the middle and at the ceiling, with one seed and with several."""
    alone = [World(a, gain, n, 1) for a in (0.02, 0.5, 0.97 - gain) for n in (20, 150, 500)]
    seeds = [World(a, gain, 150, s, spread) for a in (0.5, 0.97 - gain) for s in (2, 3, 5) for spread in (0.0, 0.2)]
    return alone + seeds


def rows(num_experiments: int) -> Iterator[Row]:
    """Simulate each kind of interval."""
    few = max(1, num_experiments // 4)
    yield from _wilson()
    for world in worlds(0.0):
        share = _share(partial(_false_claim, world), num_experiments)
        yield Row(f"false claims of a difference: {world}", share, 1 - _LEVEL + _SLACK, "lower")
    yield Row("false claims of any of 4 arms: 50 % of 150, 3 seeds", _share(_any_false_claim, few), 0.07, "lower")
    yield Row("false claims, unpaired: 50 % of 150, 1 seed", _share(_false_overlap, num_experiments), 0.07, "lower")
    kinds: tuple[tuple[str, Callable[[World, np.random.Generator], bool | None], int], ...] = (
        ("difference", _covers_difference, num_experiments),
        ("accuracy", _covers_accuracy, num_experiments),
        ("recovered share", _covers_share, few),
    )
    for name, covers, number in kinds:
        for world in worlds(0.1 if name == "recovered share" else 0.03):
            yield _coverage(f"{name}: {world}", partial(covers, world), number)
    for number in (3, 4, 6, 10):
        yield _coverage(f"exponent of a power law: {number} points", partial(_covers_exponent, number), num_experiments)
    power = _share(_is_detected, few)
    yield Row("differences shown of the size named for four in five: 50 % of 150, 1 seed", power, 0.75, "higher")


def table_cells(world: World, values: Mapping[str, float]) -> list[str]:
    """Return the figures of a world without a gain as the docs show them, in percent."""
    top = world.accuracy > 0.5
    gained, shared = (
        replace(world, accuracy=0.97 - gain if top else world.accuracy, gain=gain) for gain in (0.03, 0.1)
    )
    names = (
        f"false claims of a difference: {world}",
        f"coverage of difference: {gained}",
        f"coverage of accuracy: {gained}",
        f"coverage of recovered share: {shared}",
    )
    return [f"{100 * values[name]:.1f}" for name in names]


def _coverage(name: str, covers: Callable[[np.random.Generator], bool | None], number: int) -> Row:
    return Row(f"coverage of {name}", _share(covers, number), _LEVEL - _SLACK, "higher")


def _share(holds: Callable[[np.random.Generator], bool | None], number: int) -> float:
    """Return the share of experiments in which something holds; those without an answer are left out."""
    generator = np.random.default_rng(0)
    answers = [answer for _ in range(number) if (answer := holds(generator)) is not None]
    return float(np.mean(answers)) if answers else math.nan


def _wilson() -> Iterator[Row]:
    """Coverage of Wilson's interval, summed exactly over all counts."""
    for number in (20, 150, 500):
        ends = [wilson_interval(right, number) for right in range(number + 1)]
        accuracies = np.linspace(0.005, 0.995, 199)
        covered = [
            math.fsum(stats.binom.pmf(k, number, p) for k, (low, high) in enumerate(ends) if low <= p <= high)
            for p in accuracies
        ]
        yield Row(f"coverage of accuracy, 1 seed: {number} examples, mean", float(np.mean(covered)), 0.94, "higher")
        yield Row(f"coverage of accuracy, 1 seed: {number} examples, lowest", float(np.min(covered)), 0.83, "higher")


def _difference(world: World, generator: np.random.Generator, level: float = _LEVEL) -> tuple[float, float]:
    left, right = world.draw(generator, world.accuracy + world.gain, world.accuracy)
    return paired_interval(left, right, level=level, num_draws=_NUM_DRAWS)[1:3]


def _false_claim(world: World, generator: np.random.Generator) -> bool:
    low, high = _difference(world, generator)
    return low > 0 or high < 0


def _any_false_claim(generator: np.random.Generator) -> bool:
    first, *others = World(0.5, 0.0, 150, 3).draw(generator, *[0.5] * 5)
    level = family_level(_LEVEL, 4)
    intervals = [paired_interval(other, first, level=level, num_draws=5 * _NUM_DRAWS) for other in others]
    return any(interval.low > 0 or interval.high < 0 for interval in intervals)


def _false_overlap(generator: np.random.Generator) -> bool:
    mine, theirs = (wilson_interval(float(arm.sum()), 150) for arm in World(0.5, 0.0, 150, 1).draw(generator, 0.5, 0.5))
    return mine[0] > theirs[1] or mine[1] < theirs[0]


def _covers_difference(world: World, generator: np.random.Generator) -> bool:
    low, high = _difference(world, generator)
    return low <= world.gain <= high


def _covers_accuracy(world: World, generator: np.random.Generator) -> bool:
    (right,) = world.draw(generator, world.accuracy)
    rows = tuple({"accuracy": float(seed.mean()), "num_examples": world.num_examples} for seed in right)
    low, high = Arm("distilled", "", {}, (), rows).interval
    return low <= world.accuracy <= high


def _covers_share(world: World, generator: np.random.Generator) -> bool | None:
    """Whether the share that an arm as good as the teacher recovers covers 1; None where the report names no share.

    An unbounded interval covers everything.
    """
    baseline, arm, teacher = world.draw(generator, world.accuracy, *[world.accuracy + world.gain] * 2)
    share = recovered(baseline, arm, teacher, num_draws=_NUM_DRAWS)
    return None if share is None else share.low <= 1 <= share.high


def _covers_exponent(number: int, generator: np.random.Generator) -> bool:
    """Whether the exponent's interval covers it where each error is off by a factor of about 1.1."""
    x = [100.0 * 2**k for k in range(number)]
    law = fit_power_law(x, [float(v**-0.3 * math.exp(generator.normal(0, 0.1))) for v in x])
    assert law is not None
    return law.low <= 0.3 <= law.high


def _is_detected(generator: np.random.Generator) -> bool:
    world = World(0.5, 0.0, 150, 1)
    size = detectable(paired_interval(*world.draw(generator, 0.5, 0.5), num_draws=_NUM_DRAWS))
    left, right = world.draw(generator, 0.5 + size, 0.5)
    return paired_interval(left, right, num_draws=_NUM_DRAWS).low > 0


if __name__ == "__main__":
    main(sys.argv[1:])
