"""Simulated rates of every interval of a report, and the page that shows them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks import intervals
from benchmarks.measure import FOLDER

EXPERIMENTS = 300
PAGE = Path(__file__).parents[2] / "docs" / "statistics.md"


@pytest.mark.slow
def test_intervals_cover_at_their_level_and_seldom_claim_a_difference_that_is_not_there() -> None:
    missed = []
    for row in intervals.rows(EXPERIMENTS):
        assert row.bar is not None
        # Three standard errors of the smaller number of experiments.
        slack = 3 * math.sqrt(row.bar * (1 - row.bar) / (EXPERIMENTS // 4))
        is_met = row.value <= row.bar + slack if row.better == "lower" else row.value >= row.bar - slack
        missed += [] if is_met else [row]
    assert missed == []


def test_a_simulated_arm_has_the_accuracy_of_its_world() -> None:
    world = intervals.World(0.7, 0.1, 4000, 3, 0.1)
    generator = intervals.np.random.default_rng(1)
    first, second = world.draw(generator, 0.7, 0.8)
    assert first.shape == second.shape == (3, 4000)
    assert (first.mean(), second.mean()) == pytest.approx((0.7, 0.8), abs=0.05)
    together = (first[0] * second[0]).mean()
    assert together > first[0].mean() * second[0].mean() + 0.02  # hard for one arm, hard for the other


def test_the_page_shows_the_saved_figures() -> None:
    saved = {row["name"]: row["value"] for row in json.loads((FOLDER / "intervals.json").read_text())["rows"]}
    lines = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    shown = {cells[0]: cells[1:] for cells in lines}
    for world in intervals.worlds(0.0):
        assert shown[str(world)] == intervals.table_cells(world, saved)
