"""Configurations that name parts where they were before: taken as if they named the present place."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from distill.app import config as configuration
from distill.app.config import CONF
from distill.app.moved import MOVED, current
from distill.app.overrides import check_command_line
from distill.app.targets import nodes
from distill.errors import ConfigError
from tests.conftest import as_before, compose


def test_configurations_use_present_class_names() -> None:
    files = [yaml.safe_load(path.read_text()) or {} for path in CONF.rglob("*.yaml")]
    named = {str(node["_target_"]) for file in files for _, node in nodes(file)}
    assert not named & set(MOVED)
    assert set(MOVED.values()) <= named


def test_only_targets_are_renamed_at_any_depth() -> None:
    old, new = "distill.prompts.Layout", "distill.prompts.cues.Layout"
    kept = {"name": old, "items": [old, None, 1], "part": {"_target_": ["no", "name"]}}
    assert current({"a": [{"_target_": old, "b": kept}]}) == {"a": [{"_target_": new, "b": kept}]}


def test_an_old_class_name_is_accepted_with_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    config = compose("task=arithmetic", "task.layout._target_=distill.prompts.Layout", "tracking=off")
    now = configuration.renamed(config)
    assert now == compose("task=arithmetic", "tracking=off")
    assert OmegaConf.is_struct(now) == OmegaConf.is_struct(config)
    told = capsys.readouterr().err.splitlines()
    assert told == ["task.layout._target_: distill.prompts.Layout has moved to distill.prompts.cues.Layout"]
    assert configuration.renamed(now) is now
    assert not capsys.readouterr().err


def test_an_old_name_of_a_hydra_callback_is_refused_with_the_new_name() -> None:
    with pytest.raises(ConfigError, match=r"distill\.report\.AfterSweep: .*distill\.reports\.after_sweep\.AfterSweep"):
        check_command_line("train", ["hydra.callbacks.report._target_=distill.report.AfterSweep"])


def test_a_moved_class_name_is_no_difference_to_a_saved_configuration(tmp_path: Path) -> None:
    config = compose("task=arithmetic", "teacher.model=none")
    saved = tmp_path / "config.yaml"
    saved.write_text(yaml.safe_dump(as_before(configuration.plain(config))))
    assert saved.read_text().count("distill.prompts.Layout") == 1
    assert configuration.differences(config, saved, ignored=()) == []
    config.batch_size += 1
    assert len(configuration.differences(config, saved, ignored=())) == 1


def test_a_part_saved_before_it_gained_an_argument_has_its_default() -> None:
    part = "distill.tasks.files.FileTask"
    added = {"conflicts": None, "split_names": None, "folds": None, "fold": 0}
    assert current({"_target_": part, "path": "a"}) == {"_target_": part, "path": "a", **added}
    assert current({"_target_": part, "conflicts": "drop"})["conflicts"] == "drop"
    options = "distill.tasks.options.Options"
    assert current({"_target_": options, "show": ""}) == {"_target_": options, "separator": None, "show": ""}


def test_a_task_of_files_saved_before_its_rows_had_choices_is_the_same_task(tmp_path: Path) -> None:
    config = compose("task=jsonl", "task.path=a.jsonl", "task.choices=[yes,no]", "teacher.model=none")
    before = configuration.plain(config)
    for name in ("options", "splits"):
        del before["task"][name]
    examples = before["task"]["examples"]
    examples |= {name: value for name, value in examples.pop("rows").items() if name not in ("_target_", "options")}
    del examples["split_names"]
    saved = tmp_path / "config.yaml"
    saved.write_text(yaml.safe_dump(before))
    assert configuration.differences(config, saved, ignored=()) == []
    configuration.build(OmegaConf.create(current(before)["task"]["examples"]))
    config.task.options.answer = "text"
    assert configuration.differences(config, saved, ignored=()) != []


def test_a_teacher_saved_before_its_texts_had_settings_is_the_same_teacher(tmp_path: Path) -> None:
    config = compose("task=arithmetic", "teacher=causal_lm", "teacher.model=none")
    before = configuration.plain(config)
    generation = before["teacher"]["kind"].pop("generation")
    del before["teacher"]["batch_unit"], before["teacher"]["answers_each"]
    before["teacher"]["kind"] |= {name: generation[name] for name in ("sampling_temperature", "top_p")}
    saved = tmp_path / "config.yaml"
    saved.write_text(yaml.safe_dump(before))
    assert configuration.differences(config, saved, ignored=()) == []
    config.teacher.kind.generation.temperature = 0.5
    assert len(configuration.differences(config, saved, ignored=())) == 1


def test_arguments_that_are_now_those_of_a_part_stand_in_it() -> None:
    part = {"_target_": "distill.tasks.files.FileTask", "question": "q", "answer": "a", "rationale": None, "path": "p"}
    rows = {"_target_": "distill.tasks.files.Columns", "question": "q", "answer": "a", "rationale": None}
    added = {"conflicts": None, "split_names": None, "folds": None, "fold": 0}
    assert current(part) == {"_target_": part["_target_"], "rows": {**rows, "options": None}, "path": "p", **added}
    assert current(current(part)) == current(part)


@pytest.mark.parametrize("name", ["causal_lm", "smollm2_6_layers", "smollm2_lora"])
def test_a_student_saved_before_there_were_kinds_is_the_same_student(name: str, tmp_path: Path) -> None:
    config = compose("task=arithmetic", "teacher.model=none", f"student={name}", "student.model=none")
    values = configuration.plain(config)
    saved = tmp_path / "config.yaml"
    older = {key: value for key, value in values["student"].items() if key not in ("kind", "dropout")}
    saved.write_text(yaml.safe_dump(values | {"student": older}))
    assert configuration.differences(config, saved, ignored=()) == []
    config.student.kind.layer_decay = 0.9
    assert len(configuration.differences(config, saved, ignored=())) == 1
