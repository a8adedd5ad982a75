"""Models of one architecture are equally fast, and noise decides no verdict."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from distill.reports.charts import fronts, unbeaten
from distill.reports.costs import cost, total_spread
from distill.reports.latency import Spread, joint, ranks
from distill.reports.page import to_html
from distill.reports.text import to_markdown, to_text
from tests.reports.conftest import Make, Page, row, summary_of


def timed(milliseconds: float, architecture: str | None = "alike", spread: float = 0.05) -> dict[str, Any]:
    low, high = milliseconds * (1 - spread), milliseconds * (1 + spread)
    measured = {"ms_per_example": milliseconds, "ms_fastest": low, "ms_slowest": high}
    return measured | ({"architecture": architecture} if architecture else {})


def test_equal_architectures_share_a_measurement(make_run: Make) -> None:
    times = (70.8, 82.8, 90.4)
    folders = [make_run((loss,), 0.7, student=timed(ms)) for loss, ms in zip("abc", times, strict=True)]
    summary = summary_of(*folders, make_run(("d",), 0.7, student=timed(20.0, "small")))
    found = {arm.label: [arm.stat(key).mean for key in timed(1.0, None)] for arm in summary.trained}
    assert found["a"] == found["b"] == found["c"] == pytest.approx([82.8, 70.8 * 0.95, 90.4 * 1.05])
    # Timed in one run: as far apart as the runs of the other architecture, by a factor of 90.4/70.8 in all.
    factor = math.sqrt(90.4 / 70.8)
    assert found["d"] == pytest.approx([20.0, 19.0 / factor, 21.0 * factor])
    page = to_html(summary)
    assert "82.8" in page
    assert "[67.3, 94.9]" in page
    assert "70.8" not in page
    assert "90.4" not in page


def test_the_row_before_training_repeats_a_measurement_and_is_not_another(make_run: Make) -> None:
    folder = make_run(("a",), 0.7, student=timed(10.0))
    rows = {"student": row(0.7, **timed(10.0)), "before": row(0.5, **timed(10.0))}
    (folder / "results.json").write_text(json.dumps({"rows": rows}))
    (arm,) = summary_of(folder, make_run(("a",), 0.7, 1, student=timed(14.0))).trained
    assert arm.stat("ms_per_example").mean == pytest.approx(12.0)  # not 10.0, the median of three


def test_runs_of_earlier_versions_keep_their_times(make_run: Make) -> None:
    folders = [make_run((loss,), 0.7, student={"ms_per_example": ms}) for loss, ms in (("a", 70.8), ("b", 90.4))]
    summary = summary_of(*folders)
    assert [arm.stat("ms_per_example").mean for arm in summary.trained] == [70.8, 90.4]
    for text in (to_text(summary), to_markdown(summary), Page(to_html(summary)).text):
        assert "70.8" in text


@pytest.mark.parametrize(("is_noise", "unbeaten_labels"), [(True, ["b"]), (False, ["a", "b"])])
def test_a_front_goes_by_accuracy_where_times_overlap(
    make_run: Make, is_noise: bool, unbeaten_labels: list[str]
) -> None:
    spread = 0.2 if is_noise else 0.01
    folders = [
        make_run(("a",), 0.70, student=timed(10.0, "one", spread)),
        make_run(("b",), 0.75, student=timed(12.0, "two", spread)),
    ]
    arms = summary_of(*folders).trained
    best = unbeaten(arms, [1.0, 1.0])
    assert [arm.label for arm, is_best in zip(arms, best, strict=True) if is_best] == unbeaten_labels
    (front,) = fronts(arms, [1.0, 1.0], "s")
    assert front.title == "ms per example"
    assert [point.x for point in front.points] == [10.0, 12.0]
    assert list(front.is_best) == best


def test_totals_of_seeds_that_overlap_are_tied(make_run: Make) -> None:
    def arm(loss: str, accuracy: float, seconds: tuple[float, float]) -> list[Any]:
        runs = [{"annotate": 0.0, "train": value, "evaluate": 0.0} for value in seconds]
        return [make_run((loss,), accuracy, seed, seconds=value) for seed, value in enumerate(runs)]

    arms = summary_of(*arm("a", 0.7, (100.0, 140.0)), *arm("b", 0.75, (120.0, 130.0))).trained
    totals = [total_spread(arm, {}) for arm in arms]
    assert totals == [pytest.approx((243.4, 223.4, 263.4)), pytest.approx((248.4, 243.4, 253.4))]
    assert unbeaten(arms, totals) == [False, True]


@pytest.mark.parametrize(
    ("student", "expected"),
    [(timed(3.0), True), (timed(11.5), None), (timed(20.0), False), ({"ms_per_example": 12.0}, False)],
)
def test_break_even_needs_times_that_do_not_overlap(
    make_run: Make, student: dict[str, Any], expected: bool | None
) -> None:
    summary = summary_of(make_run(student=student))  # the teacher takes 12 ms
    (arm,) = summary.trained
    found = cost(arm, {})
    assert found.is_cheaper is expected
    assert (found.break_even_requests is not None) == (expected is True)
    last = to_markdown(summary).partition("## Cost and data")[2].splitlines()
    cells = [line for line in last if line.startswith("|")][-1]
    assert ("not shown" in cells, "never" in cells) == (expected is None, expected is False)


def test_overlapping_spreads_share_a_rank() -> None:
    spreads = [Spread(5, 4, 6), None, Spread(1, 1, 2), Spread(3, 2, 3), Spread(9, 6.5, 9)]
    assert ranks(spreads) == [2, math.inf, 1, 1, 3]
    assert ranks([Spread(5, 0, 10), Spread(1.5, 1, 2), Spread(5.5, 5, 6)]) == [1, 1, 1]  # the first overlaps both
    assert joint([None, Spread(1, 0, 2), Spread(3, 2.5, 4)]) == Spread(2, 0, 4)
    assert joint([None]) is None


def test_sizes_are_compared_at_like_type(make_run: Make) -> None:
    kinds = (("a", "float32", 40e6, 160e6), ("b", "bfloat16", 60e6, 120e6))
    folders = [
        make_run((loss,), 0.7, student={"dtype": dtype, "parameters": parameters, "size_bytes": size})
        for loss, dtype, parameters, size in kinds
    ]
    summary = summary_of(*folders)
    front = next(front for front in fronts(summary.trained, [1.0, 1.0], "s") if "size" in front.title)
    assert front.title == "size at 16 bits per weight, MB"
    assert [(point.arm.label, point.x) for point in front.points] == [("a", 80.0), ("b", 120.0)]
    page = " ".join(Page(to_html(summary)).text.split())
    assert "160.0 MB[float32]" in page
    assert "120.0 MB[bfloat16]" in page
