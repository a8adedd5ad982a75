"""What the version before the packages has saved still opens: runs, students, configurations. Its caches do not."""

from __future__ import annotations

import importlib
import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from distill.app.moved import MOVED
from distill.app.targets import nodes
from distill.reports.arms import group
from distill.reports.runs import read_runs
from distill.training.checkpoints import Checkpoints
from tests.conftest import run
from tests.system.earlier_version import COMMIT, REPOSITORY, Material, is_in_history, make

needs_history = pytest.mark.skipif(
    not is_in_history(), reason=f"this checkout's history does not hold commit {COMMIT[:7]}, whose code the test runs"
)
STEPS = "trainer.max_steps=3"
# Defaults of that version that are others today: with these the same command is the same run.
DEFAULTS = ("objective=test", "loss.answer.weight=0.1", "loss.rationale.weight=0.03")


def targets(text: str) -> list[str]:
    """Names of this package's parts in a YAML text."""
    return [
        name for _, node in nodes(yaml.safe_load(text) or {}) if (name := str(node["_target_"])).startswith("distill.")
    ]


def locate(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, check=True)
    return done.stdout


@needs_history
def test_whatever_the_earlier_configurations_name_is_found() -> None:
    files = git("ls-tree", "-r", "--name-only", COMMIT, "conf/").split()
    named = {name for path in files for name in targets(git("show", f"{COMMIT}:{path}"))}
    assert len(named) > 20
    for name in sorted(named):
        part = locate(MOVED.get(name, name))
        assert part.__name__ == MOVED.get(name, name).rpartition(".")[2]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    """A cache and two runs, made by the earlier version."""
    return make(tmp_path_factory.mktemp("earlier"))


@pytest.fixture(scope="module")
def repeated(material: Material) -> Path:
    """The finished run with another seed, by this version."""
    folder = material.root / "runs" / "repeated"
    done = run(material.root, *material.command(folder), *DEFAULTS, STEPS, "seed=1")
    assert done.returncode == 0, done.stderr
    return folder


def results(folder: Path) -> Any:
    return json.loads((folder / "results.json").read_text())["rows"]


@pytest.mark.slow
@needs_history
def test_an_earlier_cache_is_refused_and_a_new_one_is_made_beside_it(repeated: Path, material: Material) -> None:
    (earlier,) = {path.parent for path in (material.root / "cache").glob("*/manifest.jsonl")} - {cache_of(repeated)}
    assert json.loads((repeated / "run.json").read_text())["cache"]["num_annotated"] > 0
    folder = material.root / "runs" / "refused"
    done = run(material.root, *material.command(folder), *DEFAULTS, STEPS, f"cache.dir={earlier}")
    assert done.returncode == 3, done.stderr
    assert "has format 2, this version of distill reads format 3" in done.stderr


def cache_of(folder: Path) -> Path:
    return Path(json.loads((folder / "run.json").read_text())["cache"]["dir"])


@pytest.mark.slow
@needs_history
def test_an_earlier_run_is_reported_beside_its_repetition_on_a_new_cache(
    repeated: Path, material: Material, tmp_path: Path
) -> None:
    runs = [material.finished, repeated]
    done = run(tmp_path, f"runs=[{','.join(map(str, runs))}]", f"out={tmp_path / 'out'}", command="report")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "report.html").is_file()
    arms = group(read_runs(runs), [])
    assert [(arm.kind, len(arm.rows)) for arm in arms if arm.kind == "distilled"] == [("distilled", 1)] * 2


@pytest.mark.slow
@needs_history
def test_an_earlier_student_writes_the_answers_that_it_wrote(material: Material, tmp_path: Path) -> None:
    kept = [o for o in material.overrides if o.startswith(("task", "max_new_tokens"))]
    named = ["task.layout._target_=distill.prompts.Layout", f"hydra.run.dir={tmp_path / 'out'}"]
    done = run(tmp_path, f"model={material.finished / 'student'}", *kept, *named, command="evaluate")
    assert done.returncode == 0, done.stderr
    assert "distill.prompts.Layout has moved to distill.prompts.cues.Layout" in done.stderr
    row = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    before = results(material.finished)["student"]
    # Its choices are scored with their end token now, so the accuracy by choice and its calibration may be others.
    for key in ("generated_accuracy", "num_examples", "parameters"):
        assert row[key] == before[key], key


@pytest.mark.slow
@needs_history
def test_an_earlier_student_is_exported_with_its_questions(material: Material, tmp_path: Path) -> None:
    to = tmp_path / "out"
    done = run(tmp_path, f"run={material.finished}", f"to={to}", command="export")
    assert done.returncode == 0, done.stderr
    assert f"evaluates with lm-eval: cd {shlex.quote(str(to))}" in done.stdout
    assert len((to / "lm_eval" / "distill_jsonl.jsonl").read_text().splitlines()) == 6


@pytest.mark.slow
@needs_history
def test_an_earlier_run_that_ended_is_not_run_again(material: Material) -> None:
    before = (material.finished / "run.json").read_bytes()
    done = run(material.root, *material.command(material.finished), *DEFAULTS, STEPS)
    assert done.returncode == 0, done.stderr
    assert "resume=never runs it again" in done.stderr
    assert (material.finished / "run.json").read_bytes() == before


@pytest.mark.slow
@needs_history
def test_an_earlier_run_that_was_stopped_is_not_continued_on_another_cache(material: Material) -> None:
    newest = max((material.interrupted / "checkpoints").glob("step-*.ckpt"))
    step = int(newest.stem.removeprefix("step-"))
    # Lightning keeps a callback's state under the name of its class, and drops what it finds no callback for.
    assert set(torch.load(newest, weights_only=True)["callbacks"]) == {Checkpoints.__qualname__}
    # Its soft targets are in a cache that this version does not read.
    done = run(material.root, *material.command(material.interrupted), *DEFAULTS, f"trainer.max_steps={step + 2}")
    assert done.returncode == 2, done.stderr
    assert f"{newest} belongs to another run: cache was" in done.stderr
    assert "resume=never" in done.stderr
