"""The report: numbers that can be checked by hand, an honest verdict, and a page that no data can break."""

from __future__ import annotations

import math
from typing import Any

import pytest
from omegaconf import OmegaConf

from distill.reports.arms import COLUMNS, cell
from tests.reports.conftest import PLAIN, Make, summary_of


def test_interval_over_seeds_joins_test_sampling_and_seeds(make_run: Make) -> None:
    summary = summary_of(*(make_run(accuracy=p, seed=k) for k, p in enumerate((0.70, 0.74, 0.78))))
    (arm,) = [arm for arm in summary.arms if arm.kind == "distilled"]
    # mean 0.74; sd = sqrt((0.04² + 0 + 0.04²) / 2) = 0.04
    # h_test = 1.96 sqrt(0.74 · 0.26 / 500) = 0.0384485; h_seed = 4.3027 · 0.04 / sqrt(3) = 0.0993666
    half = math.sqrt(0.0384485**2 + 0.0993666**2)
    assert arm.stat("accuracy") == pytest.approx((0.74, 0.04))
    assert arm.interval == pytest.approx((0.74 - half, 0.74 + half), abs=1e-5)
    assert len(summary.seeds) == 3
    assert cell(arm, COLUMNS[0]) == "74.0 ± 4.0 % [63.3, 84.7]"


def test_one_seed_keeps_the_interval_that_evaluation_wrote(make_run: Make) -> None:
    summary = summary_of(make_run(student={"interval": [0.61, 0.83]}))
    assert summary.arms[-1].interval == (0.61, 0.83)
    assert cell(summary.arms[-1], COLUMNS[0]) == "74.0 % [61.0, 83.0]"


def test_rows_come_in_order_with_the_baseline_above_the_distilled(make_run: Make) -> None:
    summary = summary_of(make_run(), make_run(("kl",)), make_run(("answer",)))
    assert [arm.kind for arm in summary.arms] == ["teacher", "before", "baseline", "distilled", "distilled"]


def test_arms_that_differ_in_a_loss_setting_are_not_taken_for_seeds(make_run: Make) -> None:
    folders = [make_run(("kl",), config={"loss": {"kl": {"temperature": t}}}) for t in (1, 2)]
    labels = [arm.label for arm in summary_of(*folders).arms if arm.kind == "distilled"]
    assert labels == ["kl (loss.kl.temperature=1)", "kl (loss.kl.temperature=2)"]


def test_a_seed_run_twice_counts_once_and_says_so(make_run: Make) -> None:
    first, second = make_run(accuracy=0.70), make_run(accuracy=0.74, started="2026-11-22T00:00:00+00:00")
    summary = summary_of(second, first)
    assert summary.arms[-1].accuracy == 0.74
    assert len(summary.arms[-1].rows) == 1
    assert any(str(first) in note and "same seed" in note for note in summary.notes)


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
        {"a_part_that_is_new": {"share": 0.5}},
    ],
    ids=str,
)
def test_runs_that_were_taught_in_another_way_are_no_seeds_of_one_arm(change: dict[str, Any], make_run: Make) -> None:
    plain = PLAIN | {name: {} for name in change if name not in PLAIN}
    config = OmegaConf.to_container(OmegaConf.merge(plain, change))
    runs = [make_run(config=plain), make_run(seed=1, config=plain), make_run(seed=2, config=config)]
    summary = summary_of(*runs)
    assert sorted(len(arm.runs) for arm in summary.trained) == [1, 2]
    (name,) = change
    assert any(name in arm.label for arm in summary.trained if arm.runs)


def test_runs_that_were_only_made_elsewhere_or_in_other_pieces_are_seeds_of_one_arm(make_run: Make) -> None:
    elsewhere = {
        "task": PLAIN["task"] | {"path": "/b/train.jsonl"},
        "teacher": PLAIN["teacher"] | {"kind": {"files": ["/b/said.jsonl"]}},
        "trainer": PLAIN["trainer"] | {"devices": 2, "strategy": {"_target_": "a.Strategy"}},
        "microbatch_size": 4,
        "root": "/b",
        "cache": {"dir": None},
    }
    summary = summary_of(make_run(config=PLAIN), make_run(seed=1, config=PLAIN | elsewhere))
    (arm,) = (arm for arm in summary.trained if arm.runs)
    assert [run.seed for run in arm.runs] == ["0", "1"]


def test_what_the_teacher_did_is_of_no_matter_to_labels_alone(make_run: Make) -> None:
    other = PLAIN | {"rationales": {"arithmetic": False}, "teacher": {"num_rationales": 120}}
    summary = summary_of(make_run(("answer",), config=PLAIN), make_run(("answer",), seed=1, config=other))
    (arm,) = (arm for arm in summary.trained if arm.runs)
    assert len(arm.rows) == 2
