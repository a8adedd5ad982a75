"""Labels of losses name arms in reports, and decide nothing."""

from __future__ import annotations

from pathlib import Path

import yaml

from distill.app.config import differences, plain, without_labels
from tests.conftest import compose, conf_names

CONF = Path(__file__).parents[2] / "conf"


def test_every_loss_has_a_label_of_its_own() -> None:
    names = conf_names("loss")
    labels = [yaml.safe_load((CONF / "loss" / f"{name}.yaml").read_text())[name]["label"] for name in names]
    assert len(set(labels)) == len(names)
    assert all(labels)


def test_a_run_without_labels_is_the_same_run(tmp_path: Path) -> None:
    config = compose("task=arithmetic", "teacher.model=none")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(without_labels(plain(config))))
    assert "label:" not in path.read_text()
    assert differences(config, path, ignored=()) == []
    path.write_text(yaml.safe_dump(plain(compose("task=arithmetic", "teacher.model=none", "loss.answer.weight=7"))))
    assert [line.partition(" ")[0] for line in differences(config, path, ignored=())] == ["loss.answer.weight"]
