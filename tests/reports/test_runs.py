"""Run folders of earlier versions, and damaged ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from distill.app import config as configuration
from distill.reports.runs import read_run
from tests.conftest import as_before, compose


def test_runs_of_before_and_after_are_seeds_of_one_arm(tmp_path: Path) -> None:
    plain = configuration.plain(compose("task=arithmetic", "teacher.model=none"))
    for name, config in (("old", as_before(plain)), ("new", plain)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(config))
        (tmp_path / name / "run.json").write_text(json.dumps({"losses": ["kl"], "seed": 0}))
    old, new = (read_run(tmp_path / name).settings for name in ("old", "new"))
    assert old == new
    assert old["task.layout._target_"] == "distill.prompts.cues.Layout"


@pytest.mark.parametrize("text", ["a: &a [*a]", "a: &a {b: *a}"])
def test_a_configuration_that_holds_itself_is_damaged(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    found = read_run(tmp_path)
    assert found.config == {}
    assert any(problem.startswith("config.yaml is damaged") for problem in found.problems)
