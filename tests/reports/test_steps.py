"""Steps to equal: closed forms of curves, seeds, and what cannot be compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from distill.reports.page import to_html
from distill.reports.steps import Reached, first_reach, steps_to_equal
from distill.reports.tables import tables
from distill.reports.text import to_markdown, to_text
from tests.reports.conftest import Make, summary_of

LABELS, SOFT, BOTH = ("answer",), ("kl",), ("answer", "kl")


def with_curve(folder: Path, points: Sequence[tuple[int, float]], metric: str = "val/cross_entropy") -> Path:
    """Replace a run's curve; training rows stand at the same steps, before and behind the validations."""
    lines = [f"step,train/answer,{metric}"]
    for step, loss in points:
        lines += [f"{step - 1},3.0,", f"{step - 1},,{loss}", f"{step - 1},2.0,"]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    return folder


def straight(slope: float, start: float = 4.0) -> list[tuple[int, float]]:
    return [(step, start - slope * step) for step in range(20, 201, 20)]


def exponential(rate: float) -> list[tuple[int, float]]:
    return [(step, 1 + 3 * math.exp(-rate * step)) for step in range(20, 201, 20)]


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (3.0, Reached(10, False)),
        (2.5, Reached(15, False)),
        (2.0, Reached(20, False)),
        (1.75, Reached(35, False)),
        (4.0, Reached(0, True)),
        (5.0, Reached(0, True)),
        (0.5, None),
    ],
)
def test_a_loss_is_reached_on_the_line_between_two_validations(loss: float, expected: Reached | None) -> None:
    # It rises in between: the first time counts.
    assert first_reach([(0.0, 4.0), (20.0, 2.0), (30.0, 2.5), (40.0, 1.0)], loss) == expected


def test_answers_after_reasoning_and_at_once_have_losses_of_their_own(make_run: Make) -> None:
    def compared(*modes: str) -> int:
        pairs = zip((LABELS, BOTH), modes, strict=True)
        runs = [make_run(losses, config={"task": {"answer_mode": mode}}) for losses, mode in pairs]
        for run in runs:
            with_curve(run, straight(0.01))
        return len(steps_to_equal(summary_of(*runs).arms))

    assert compared("direct", "direct") == 1
    assert compared("direct", "reasoned") == 0


def test_nothing_is_reached_on_a_curve_without_points() -> None:
    assert first_reach([], 1.0) is None


@pytest.mark.parametrize("factor", [1.25, 2.0, 3.0])
def test_an_arm_that_learns_faster_by_a_factor_needs_that_part_of_the_steps(make_run: Make, factor: float) -> None:
    slow, fast = make_run(LABELS), make_run(SOFT)
    with_curve(slow, straight(0.005))
    with_curve(fast, straight(0.005 * factor))
    (pair,) = steps_to_equal(summary_of(slow, fast).trained)
    assert (pair.arm.losses, pair.rival.losses) == (SOFT, LABELS)
    assert pair.ratios == {"0": pytest.approx(1 / factor)}
    assert pair.text == f"{1 / factor:.2f}"


@pytest.mark.parametrize("turn", [list, lambda folders: folders[::-1]])
def test_the_direction_does_not_depend_on_the_order_of_runs(make_run: Make, turn: Callable[..., list[Path]]) -> None:
    folders = [with_curve(make_run(LABELS), exponential(0.02)), with_curve(make_run(SOFT), exponential(0.01))]
    (pair,) = steps_to_equal(summary_of(*turn(folders)).trained)
    assert (pair.arm.losses, pair.rival.losses) == (LABELS, SOFT)
    # Straight lines lie above a convex curve, and meet it at every validation.
    assert pair.ratios["0"] == pytest.approx(0.5)


def test_the_spread_is_over_the_seeds_that_both_arms_have(make_run: Make) -> None:
    slow = [with_curve(make_run(LABELS, seed=seed), straight(0.005)) for seed in (0, 1, 2)]
    fast = [with_curve(make_run(SOFT, seed=seed), straight(0.005 * 2**seed)) for seed in (1, 2, 3)]
    (pair,) = steps_to_equal(summary_of(*slow, *fast).trained)
    assert pair.ratios == {"1": pytest.approx(0.5), "2": pytest.approx(0.25)}
    assert pair.text == f"0.38 ± {0.25 / math.sqrt(2):.2f}"


def test_a_seed_that_never_gets_there_is_named(make_run: Make) -> None:
    slow = [with_curve(make_run(LABELS, seed=seed), straight(0.005)) for seed in (0, 1)]
    fast = [with_curve(make_run(SOFT, seed=0), straight(0.01)), with_curve(make_run(SOFT, seed=1), straight(0.004))]
    (pair,) = steps_to_equal(summary_of(*slow, *fast).trained)
    assert pair.ratios == {"0": pytest.approx(0.5), "1": None}
    assert pair.text == "0.50, not reached in 1 of 2 seeds"
    assert pair._replace(ratios={"0": None}).text == "not reached"


def test_what_is_reached_at_the_first_validation_is_a_bound(make_run: Make) -> None:
    folders = [with_curve(make_run(LABELS), straight(0.0001)), with_curve(make_run(SOFT), straight(0.01))]
    (pair,) = steps_to_equal(summary_of(*folders).trained)
    assert pair.text == "at most 0.10"


def test_an_arm_without_a_loss_on_labels_has_a_curve_of_the_common_metric(make_run: Make) -> None:
    folders = [with_curve(make_run(LABELS), straight(0.005), "val/answer"), with_curve(make_run(SOFT), straight(0.01))]
    assert not steps_to_equal(summary_of(*folders).trained)
    folders = [
        with_curve(make_run(losses), straight(slope), "val/answer") for losses, slope in ((LABELS, 0.005), (BOTH, 0.01))
    ]
    assert len(steps_to_equal(summary_of(*folders).trained)) == 1


@pytest.mark.parametrize("change", [{"batch_size": 32}, {"start": "other"}, {"task": "other"}])
def test_steps_of_other_sizes_students_and_tasks_are_not_compared(make_run: Make, change: dict[str, object]) -> None:
    folders = [with_curve(make_run(LABELS), straight(0.005)), with_curve(make_run(SOFT, **change), straight(0.01))]
    assert not steps_to_equal(summary_of(*folders).trained)


def test_the_table_is_in_every_form_of_the_report(make_run: Make) -> None:
    folders = [with_curve(make_run(LABELS), straight(0.005)), with_curve(make_run(SOFT), straight(0.01))]
    summary = summary_of(*folders)
    for text in (to_text(summary), to_markdown(summary), to_html(summary)):
        assert "steps to equal" in text.lower()
    (line,) = tables(summary)["steps_to_equal"]
    assert line["ratio"] == pytest.approx(0.5)


@pytest.mark.parametrize(("max_pairs", "is_said"), [(1, True), (3, False)])
def test_pairs_that_are_left_out_are_counted_in_every_form_of_the_report(
    max_pairs: int, is_said: bool, make_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.reports.steps.MAX_PAIRS", max_pairs)
    slopes = ((LABELS, 0.005), (SOFT, 0.01), (BOTH, 0.012))
    summary = summary_of(*(with_curve(make_run(losses), straight(slope)) for losses, slope in slopes))
    assert len(steps_to_equal(summary.trained)) == (2 if is_said else 3)
    for text in (to_text(summary), to_markdown(summary), to_html(summary)):
        assert ("of 3 pairs of arms, the 1 without an arm" in " ".join(text.split())) == is_said


def test_a_damaged_curve_is_read_as_far_as_it_is_a_number(make_run: Make) -> None:
    slow, fast = with_curve(make_run(LABELS), straight(0.005)), make_run(SOFT)
    (fast / "metrics.csv").write_text("step,val/cross_entropy\n19,nan\nten,1\n99,3.0\n199,2.0\n")
    (pair,) = steps_to_equal(summary_of(slow, fast).trained)
    assert pair.ratios == {"0": pytest.approx(100 / 200)}
