"""Run folders of earlier versions, and damaged ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.app import config as configuration
from distill.reports.arms import group
from distill.reports.runs import read_run, read_runs
from distill.reports.verdicts import summarise
from tests.conftest import as_before, compose


def test_runs_of_an_earlier_and_this_version_are_seeds_of_one_arm(tmp_path: Path) -> None:
    plain = configuration.plain(compose("task=arithmetic", "teacher.model=none"))
    for name, config in (("old", as_before(plain)), ("new", plain)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(config))
        (tmp_path / name / "run.json").write_text(json.dumps({"losses": ["kl"], "seed": 0}))
    old, new = (read_run(tmp_path / name).settings for name in ("old", "new"))
    assert old == new
    assert old["task.layout._target_"] == "distill.prompts.cues.Layout"


def write_finished_run(path: Path, config: dict[str, Any], seed: int) -> Path:
    """Write a finished run with this configuration."""
    path.mkdir()
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    (path / "run.json").write_text(json.dumps({"losses": ["kl"], "seed": seed, "started": str(seed)}))
    row = {"accuracy": 0.5, "num_examples": 4, "interval": [0.2, 0.8]}
    (path / "results.json").write_text(json.dumps({"rows": {"student": row}}))
    return path


OTHERS = ((1, None), (1, 2), (2, None))


def test_a_null_setting_equals_one_that_an_earlier_version_lacks(tmp_path: Path) -> None:
    configs: list[dict[str, Any]] = [{"a": {"b": 1}}, *({"a": {"b": b}, "c": {"new": n}} for b, n in OTHERS)]
    runs = read_runs(write_finished_run(tmp_path / str(seed), config, seed) for seed, config in enumerate(configs))
    arms = [arm for arm in group(runs, []) if arm.runs]
    assert [len(arm.runs) for arm in arms] == [2, 1, 1]
    assert [arm.label for arm in group(runs[:2] + runs[3:], []) if arm.runs] == ["kl (a.b=1)", "kl (a.b=2)"]
    earlier, current = (summarise([run, runs[3]]).contrasts for run in runs[:2])
    assert [contrast.change for contrast in earlier] == [contrast.change for contrast in current]
    assert len(earlier) == 1


@pytest.mark.parametrize("text", ["a: &a [*a]", "a: &a {b: *a}"])
def test_a_configuration_that_contains_itself_is_damaged(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    run = read_run(tmp_path)
    assert run.config == {}
    assert any(problem.startswith("config.yaml is damaged") for problem in run.problems)
