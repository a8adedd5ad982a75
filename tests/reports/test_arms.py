"""Runs are grouped into arms, and the intervals of their accuracy can be checked by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
from omegaconf import OmegaConf

from distill.reports.arms import COLUMNS, PEAK, SEED_COLUMNS, cell
from tests.reports.conftest import CONFIG, Make, summary_of


def test_interval_over_seeds_covers_test_sampling_and_seeds(make_run: Make) -> None:
    summary = summary_of(*(make_run(accuracy=p, seed=k) for k, p in enumerate((0.70, 0.74, 0.78))))
    (arm,) = [arm for arm in summary.arms if arm.kind == "distilled"]
    # mean 0.74; sd = sqrt((0.04² + 0 + 0.04²) / 2) = 0.04; h_seed = 4.30265 · 0.04 / sqrt(3) = 0.0993655
    # Wilson's ends with z² = 3.841459: (0.74 + z²/1000 -+ z sqrt(0.74 · 0.26/500 + z²/1,000,000))/(1 + z²/500)
    assert arm.stat("accuracy") == pytest.approx((0.74, 0.04))
    low, high = 0.74 - math.hypot(0.74 - 0.6998184, 0.0993655), 0.74 + math.hypot(0.7765218 - 0.74, 0.0993655)
    assert arm.interval == pytest.approx((low, high), abs=1e-5)
    assert len(summary.seeds) == 3
    assert cell(arm, COLUMNS[0]) == "74.0 ± 4.0 % [63.3, 84.6]"


@pytest.mark.parametrize(("accuracy", "expected"), [(1.0, (0.8388699, 1.0)), (0.0, (0.0, 0.1611301))])
def test_seeds_that_all_score_0_or_100_percent_have_an_interval_with_a_width(
    make_run: Make, accuracy: float, expected: tuple[float, float]
) -> None:
    summary = summary_of(*(make_run(accuracy=accuracy, seed=k, student={"num_examples": 20}) for k in range(2)))
    assert summary.arms[-1].interval == pytest.approx(expected, abs=1e-4)  # n/(n + z²) of 20


def test_one_seed_keeps_the_interval_of_its_evaluation(make_run: Make) -> None:
    summary = summary_of(make_run(student={"interval": [0.61, 0.83]}))
    assert summary.arms[-1].interval == (0.61, 0.83)
    assert cell(summary.arms[-1], COLUMNS[0]) == "74.0 % [61.0, 83.0]"


def test_arms_are_ordered_with_the_baseline_above_the_distilled(make_run: Make) -> None:
    summary = summary_of(make_run(), make_run(("kl",)), make_run(("answer",)))
    assert [arm.kind for arm in summary.arms] == ["teacher", "before", "baseline", "distilled", "distilled"]


def test_runs_with_different_loss_settings_are_different_arms(make_run: Make) -> None:
    folders = [make_run(("kl",), config={"loss": {"kl": {"temperature": t}}}) for t in (1, 2)]
    labels = [arm.label for arm in summary_of(*folders).arms if arm.kind == "distilled"]
    assert labels == ["kl (loss.kl.temperature=1)", "kl (loss.kl.temperature=2)"]


def test_a_seed_run_twice_counts_once_and_is_noted(make_run: Make) -> None:
    first, second = make_run(accuracy=0.70), make_run(accuracy=0.74, started="2026-11-22T00:00:00+00:00")
    summary = summary_of(second, first)
    assert summary.arms[-1].accuracy == 0.74
    assert len(summary.arms[-1].rows) == 1
    assert any(str(first) in note and "same seed" in note for note in summary.notes)


def test_every_run_that_another_one_replaces_is_noted(make_run: Make) -> None:
    started = [f"2026-11-22T0{hour}:00:00+00:00" for hour in range(3)]
    folders = [make_run(started=time) for time in started]
    assert [note.split()[0] for note in summary_of(*folders).notes] == [str(folder) for folder in folders[:2]]


@pytest.mark.parametrize("student", [{"lora": {"r": 4}}, {"from_scratch": True}, {"kind": {"head_rate": 10.0}}])
def test_students_that_draw_weights_by_seed_are_one_arm(make_run: Make, student: dict[str, Any]) -> None:
    folders = [make_run(seed=seed, start=f"weights{seed}", config={"student": student}) for seed in (0, 1)]
    assert [len(arm.runs) for arm in summary_of(*folders).trained] == [2]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        (("teacher_answer",), True),
        (("answer", "teacher_answer"), True),
        (("answer", "kl", "teacher_answer"), False),
        (("answer",), False),
    ],
)
def test_an_arm_has_hard_labels_alone_if_it_learns_nothing_else_of_the_teacher(
    make_run: Make, losses: tuple[str, ...], expected: bool
) -> None:
    (arm,) = summary_of(make_run(losses)).trained
    assert arm.has_hard_labels == expected


@pytest.mark.parametrize(
    "change",
    [
        {"order": "short_first"},
        {"balance": "answer"},
        {"rationales": {"arithmetic": False}},
        {"teacher": {"num_rationales": 120}},
        {"overlap": {"action": "drop"}},
        {"trainer": {"gradient_clip_val": 0.5}},
        {"task": {"answer_mode": "reasoned"}},
        {"task": {"examples": {"split_seed": 1}}},
        {"a_new_section": {"share": 0.5}},
    ],
    ids=str,
)
def test_runs_with_different_training_are_different_arms(change: dict[str, Any], make_run: Make) -> None:
    original = CONFIG | {name: {} for name in change if name not in CONFIG}
    config = OmegaConf.to_container(OmegaConf.merge(original, change))
    runs = [make_run(config=original), make_run(seed=1, config=original), make_run(seed=2, config=config)]
    summary = summary_of(*runs)
    assert sorted(len(arm.runs) for arm in summary.trained) == [1, 2]
    (name,) = change
    assert any(name in arm.label for arm in summary.trained if arm.runs)


def test_runs_on_other_machines_or_with_other_microbatches_are_seeds_of_one_arm(make_run: Make) -> None:
    elsewhere = {
        "task": CONFIG["task"] | {"path": "/b/train.jsonl"},
        "teacher": CONFIG["teacher"] | {"kind": {"files": ["/b/answers.jsonl"]}},
        "trainer": CONFIG["trainer"] | {"devices": 2, "strategy": {"_target_": "a.Strategy"}},
        "microbatch_size": 4,
        "root": "/b",
        "cache": {"dir": None},
    }
    summary = summary_of(make_run(config=CONFIG), make_run(seed=1, config=CONFIG | elsewhere))
    (arm,) = (arm for arm in summary.trained if arm.runs)
    assert [run.seed for run in arm.runs] == ["0", "1"]


def test_settings_of_the_teacher_do_not_split_the_baseline(make_run: Make) -> None:
    other = CONFIG | {"rationales": {"arithmetic": False}, "teacher": {"num_rationales": 120}}
    summary = summary_of(make_run(("answer",), config=CONFIG), make_run(("answer",), seed=1, config=other))
    (arm,) = (arm for arm in summary.trained if arm.runs)
    assert len(arm.rows) == 2


def test_units_and_columns_are_these() -> None:
    units = {column.key: [size for size, _ in column.units] for column in (*COLUMNS, PEAK)}
    assert units["parameters"] == [1e9, 1e6, 1e3, 1.0]
    assert units["size_bytes"] == units["peak_bytes"] == [1e9, 1e6, 1e3, 1.0]
    assert units["training_seconds"] == [3600.0, 60.0, 1.0]
    assert units["accuracy"] == [0.01]
    of_seeds = ["accuracy", "generated_accuracy", "agreement", "kl", "ece", "training_seconds", "num_unreadable"]
    assert [column.key for column in SEED_COLUMNS] == of_seeds
