"""Offline W&B runs that can be read back, one for each run, with no secret in any file."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distill.app import config as configuration
from distill.app.tracking import NoTracking, _settings
from distill.errors import ConfigError
from tests.app.conftest import inspected
from tests.conftest import compose

RUN = """
import json, os, sys
from pathlib import Path
import lightning
from distill.app import config as configuration

root = Path(sys.argv[1])
ended = []
for seed in (0, 1):
    tracking = configuration.build(configuration.compose("train", ["tracking.tags=[tiny]"]).tracking)
    folder = root / f"run-{seed}"
    config = {"seed": seed, "loss": {"kl": {"temperature": 2.0}}}
    tracking.start(folder, name=f"kl-seed{seed}", group="a sweep", job_type="train", config=config)
    (logger,) = tracking.loggers()
    for step in range(4):
        logger.log_metrics({"train/kl": 2.0 - step / 4 + seed}, step)
    tracking.summary({"test/accuracy": 0.5 + seed / 4})
    tracking.table("comparison", [{"model": "teacher", "accuracy": 0.9}, {"model": "student", "accuracy": None}])
    (folder / "student").mkdir()
    (folder / "student" / "weights").write_text("weights")
    tracking.artifact("student", "model", folder / "student", {"start": "abc"})
    tracking.artifact("cache", "cache", folder / "student", {"num_records": 3})
    ended.append(tracking.finish(0))
print("no more", file=sys.stderr)
print(json.dumps(ended))
"""


def test_wandb_reads_no_git_remote_and_no_output_of_the_run() -> None:
    settings = _settings()  # a remote's URL may hold a token, and so may what a run prints
    assert settings.disable_git
    assert settings.console == "off"


CANARY = "c0ffee" * 6 + "cafe"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    """Two runs of one process, a key in its environment."""
    root = tmp_path_factory.mktemp("tracked")
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    environment = kept | {
        "WANDB_MODE": "offline",
        "WANDB_API_KEY": CANARY,
        "HOME": str(root / "home"),
        "PYTHONPATH": path,
    }
    command = [sys.executable, "-c", RUN, str(root)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "no more\n"  # W&B printed nothing
    assert len(done.stdout.splitlines()) == 1
    return root, json.loads(done.stdout.splitlines()[-1])


def test_two_runs_in_one_process_are_two_runs(runs: tuple[Path, list[dict[str, str]]]) -> None:
    root, ended = runs
    for seed, end in enumerate(ended):
        assert end["mode"] == "offline"
        assert Path(end["where"]).is_relative_to(root / f"run-{seed}")
        assert end["upload"] == f"wandb sync {end['where']}"
        assert len(list(Path(end["where"]).glob("*.wandb"))) == 1
    assert len({Path(end["where"]).name.rpartition("-")[2] for end in ended}) == 2  # their ids


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_can_be_read_back_with_its_config_history_and_summary(
    seed: int, runs: tuple[Path, list[dict[str, str]]]
) -> None:
    _, ended = runs
    (summary,) = inspected(ended[seed]["where"], "--summary")
    told = json.dumps(summary)
    assert f'"kl-seed{seed}"' in told
    assert summary["config"]["seed"] == seed
    assert summary["config"]["loss"]["kl"]["temperature"] == 2.0
    records = inspected(ended[seed]["where"])
    history = [record for record in records if record["type"] == "history"]
    values = [float(v) for v in _items(history, "train/kl")]
    assert values == [2.0 - step / 4 + seed for step in range(4)]
    accuracy = [float(v) for v in _items([summary, *records], "test/accuracy")]
    assert accuracy
    assert set(accuracy) == {0.5 + seed / 4}
    kinds = {record["type"] for record in records}
    assert {"run", "history", "summary"} <= kinds
    assert any("artifact" in json.dumps(record) for record in records)
    assert "a sweep" in json.dumps(records)


def _items(value: Any, name: str) -> list[Any]:
    """Every value that stands under a name, at any depth, or beside it as `key` and `value`."""
    if isinstance(value, list):
        return [found for item in value for found in _items(item, name)]
    if not isinstance(value, dict):
        return []
    keys = [value.get("key"), ".".join(value.get("nested_key") or value.get("nestedKey") or ["-"])]
    here = [value[name]] if name in value else []
    if name in keys:
        here += [value[k] for k in ("value", "value_json", "valueJson") if k in value]
    return here + [found for item in value.values() for found in _items(item, name)]


def test_a_key_is_in_no_file(runs: tuple[Path, list[dict[str, str]]]) -> None:
    root, _ = runs
    files = [path for path in root.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]


def test_nothing_is_written_beside_the_run(runs: tuple[Path, list[dict[str, str]]]) -> None:
    root, _ = runs
    elsewhere = [path for path in root.iterdir() if path.name not in ("run-0", "run-1")]
    assert not [path for folder in elsewhere for path in folder.rglob("*wandb*")]


GOES_ON = """
import json, sys
from pathlib import Path
from tests.conftest import compose
from distill.app import config as configuration

folders = []
for part in (range(3), range(3, 5)):
    tracking = configuration.build(compose().tracking)
    tracking.start(Path(sys.argv[1]), name="kl", group=None, job_type="train", config={})
    for step in part:
        tracking.loggers()[0].log_metrics({"train/kl": 2.0 - step}, step)
    folders.append(tracking.finish(85)["where"])
print(json.dumps(folders))
"""


@pytest.mark.slow
def test_a_resumed_run_continues_the_same_run_and_axis(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    told = {"WANDB_MODE": "offline", "HOME": str(tmp_path / "home"), "PYTHONPATH": path}
    command = [sys.executable, "-c", GOES_ON, str(tmp_path / "run")]
    done = subprocess.run(command, env=os.environ | told, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    parts = [inspected(folder) for folder in json.loads(done.stdout.splitlines()[-1])]
    ids = {record["run_id"] for part in parts for record in _items(part, "run") if "run_id" in record}
    assert len(ids) == 1
    steps = [sorted({float(v) for v in _items(part, "trainer/global_step")}) for part in parts]
    assert steps == [[0, 1, 2], [3, 4]]


class OfflineRun:
    """Keeps the artifacts that a run of W&B would send."""

    offline = True

    def __init__(self) -> None:
        self.artifacts: list[Any] = []

    def log_artifact(self, artifact: Any) -> None:
        self.artifacts.append(artifact)


def test_a_model_is_recorded_with_checksums_and_a_cache_without_reading_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staging"))
    folder = tmp_path / "student"
    (folder / "deeper").mkdir(parents=True)
    for name in ("weights", "deeper/tokens"):
        (folder / name).write_text(name)
    tracking = configuration.build(compose().tracking)
    tracking._run = OfflineRun()
    tracking.artifact("student", "model", folder, {"start": "abc"})
    tracking.artifact("cache", "cache", tmp_path / "many shards", {"fingerprint": "f00", "num_records": 3})
    model, cache = tracking._run.artifacts
    digests = {name: entry.digest for name, entry in model.manifest.entries.items()}
    assert digests == {
        name: base64.b64encode(hashlib.md5(name.encode()).digest()).decode() for name in ("weights", "deeper/tokens")
    }
    (entry,) = cache.manifest.entries.values()
    assert json.loads(Path(entry.local_path).read_text()) == {
        "folder": str(tmp_path / "many shards"),
        "fingerprint": "f00",
        "num_records": 3,
    }
    assert capsys.readouterr() == ("", "")


def test_no_tracking_does_nothing(tmp_path: Path) -> None:
    tracking = NoTracking()
    tracking.start(tmp_path, name="x", group=None, job_type="train", config={})
    tracking.summary({"a": 1})
    tracking.table("t", [{"a": 1}])
    tracking.artifact("a", "model", tmp_path, {})
    assert tracking.loggers() == []
    assert tracking.finish(0)["mode"] == "off"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "mode", "asked", "expected"),
    [
        ("", None, "auto", "offline"),
        ("", "online", "offline", "online"),
        ("k" * 40, None, "auto", "online"),
        ("k" * 40, "offline", "auto", "offline"),
    ],
)
def test_the_mode_is_offline_unless_a_key_is_set_or_the_environment_says_otherwise(
    key: str, mode: str | None, asked: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    tracking = configuration.build(compose(f"tracking.mode={asked}").tracking)
    assert tracking._chosen_mode() == expected


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (f"tracking.tags=[tiny,{'t' * 65}]", "at most 64 characters"),
        ("tracking.tags=['']", "at least 1 character"),
        (f"tracking.project={'p' * 129}", "at most 128 characters"),
        ("tracking.project=''", "at least 1 character"),
        ("tracking.project='a/b'", "W&B takes no / \\ # ? % : in a project, found /"),
        ("tracking.project='50%'", "found %"),
        (f"tracking.group={'g' * 129}", "at most 128 characters"),
        (f"tracking.entity={'e' * 129}", "at most 128 characters"),
    ],
)
def test_what_wandb_does_not_take_is_refused_with_the_configuration(override: str, told: str) -> None:
    key = override.partition("=")[0].partition(".")[2]
    with pytest.raises(ConfigError) as raised:
        configuration.check(compose(override))
    (problem,) = raised.value.problems
    assert problem.startswith(f"tracking: {key}=")
    assert told in problem


@pytest.mark.slow
def test_names_of_any_sweep_and_of_many_losses_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracking = configuration.build(compose(f"tracking.tags=[{'t' * 64}]").tracking)
    tracking.start(tmp_path, name="n" * 200, group="g" * 200, job_type="train", config={})
    run = tracking._run
    assert (run.name, run.group, run.tags) == ("n" * 128, "g" * 128, ("t" * 64,))
    assert tracking.finish(0)["mode"] == "offline"


@pytest.mark.parametrize("override", ["tracking.project='a/b'", f"tracking.tags=[{'t' * 65}]"])
def test_a_failed_start_says_how_to_continue(override: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracking = configuration.build(compose(override).tracking)
    with pytest.raises(ConfigError, match="tracking=off"):
        tracking.start(tmp_path, name="x", group=None, job_type="train", config={})
    assert tracking.finish(1)["mode"] == "off"
