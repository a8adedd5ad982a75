"""The folds of a cross-validation are one run per seed, on all examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distill.reports.runs import read_run
from distill.reports.verdicts import Summary, summarise
from tests.reports.conftest import CONFIG, Make, answers, summary_of

LABELS, DISTILLED = ("answer",), ("answer", "kl")
NUM_FOLDS, NUM = 4, 400


def config(fold: int | None) -> dict[str, Any]:
    examples = {"split_seed": 0} | ({} if fold is None else {"folds": NUM_FOLDS, "fold": fold})
    return CONFIG | {"task": CONFIG["task"] | {"examples": examples}}


def folds(make_run: Make, losses: tuple[str, ...], accuracy: float, seed: int, chosen: range) -> list[Path]:
    """The runs of an arm and seed whose predictions together are those of `whole`."""
    lines, size = answers(losses, accuracy, seed, NUM), NUM // NUM_FOLDS
    parts = {fold: lines[fold * size : (fold + 1) * size] for fold in chosen}
    return [
        make_run(
            losses,
            sum(line["is_correct"] for line in part) / size,
            seed,
            config=config(fold),
            student={"num_examples": size},
            predictions=part,
            counts={"train": 300, "labelled": 300 - fold % 2, "test": size},
            started=f"2026-11-21T21:0{fold}:00+00:00",
        )
        for fold, part in parts.items()
    ]


def whole(make_run: Make, losses: tuple[str, ...], accuracy: float, seed: int) -> Path:
    lines = answers(losses, accuracy, seed, NUM)
    student = {"num_examples": NUM, "interval": None}
    counts = {"train": 300, "labelled": 300, "test": NUM}
    return make_run(losses, accuracy, seed, config=config(None), student=student, predictions=lines, counts=counts)


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_joined_folds_give_the_verdict_of_one_test_split(make_run: Make, seeds: tuple[int, ...]) -> None:
    arms = [(LABELS, 0.7), (DISTILLED, 0.8)]
    joined = summary_of(*(f for arm in arms for seed in seeds for f in folds(make_run, *arm, seed, range(NUM_FOLDS))))
    expected = summary_of(*(whole(make_run, *arm, seed) for arm in arms for seed in seeds))
    assert verdict(joined) == verdict(expected)
    assert figures(joined) == pytest.approx(figures(expected))


def verdict(summary: Summary) -> tuple[Any, ...]:
    (judged,) = summary.verdicts
    assert judged.difference is not None
    return judged.status, judged.difference.interval, judged.difference.share


def figures(summary: Summary) -> list[float]:
    return [value for arm in summary.trained for value in (arm.accuracy, *arm.interval, arm.stat("num_examples").mean)]


def test_a_joint_run_has_the_mean_of_times_and_curves_and_all_of_the_annotation(make_run: Make) -> None:
    members = folds(make_run, DISTILLED, 0.75, 0, range(NUM_FOLDS))
    (arm,) = summary_of(*members).trained
    (run,), (row,) = arm.runs, arm.rows
    runs = [read_run(folder) for folder in members]
    assert row["ms_per_example"] == 12.0
    assert run.facts["seconds"] == runs[0].facts["seconds"]
    assert run.facts["cache"]["annotation_seconds"] == pytest.approx(NUM_FOLDS * 123.4)
    joint, *own = ([line["val/accuracy"] for line in r.metrics if line.get("val/accuracy")] for r in (run, *runs))
    assert joint == pytest.approx([sum(map(float, values)) / NUM_FOLDS for values in zip(*own, strict=True)])
    assert len({values[-1] for values in own}) > 1


def test_folds_that_are_missing_or_were_run_twice_are_named(make_run: Make) -> None:
    members = folds(make_run, DISTILLED, 0.75, 0, range(3))
    (again,) = folds(make_run, DISTILLED, 0.75, 0, range(2, 3))
    summary = summarise([read_run(folder) for folder in (*members, again)])
    assert [arm.stat("num_examples").mean for arm in summary.trained] == [300]
    assert any("is ignored" in note and "same fold" in note for note in summary.notes)
    assert any("only 3 of 4 folds are complete: 0, 1, 2" in note for note in summary.notes)
    assert len(summary.runs) == 4
