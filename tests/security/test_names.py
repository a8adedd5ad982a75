"""Names, URLs and links lead to no file outside the intended folders."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import wandb
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from distill.annotation import annotation_job
from distill.annotation.annotation_job import open_annotation_job
from distill.app import config as configuration
from distill.app.files import atomic_write
from distill.app.quoting import literal
from distill.app.tracking import artifact_name
from distill.cache.claims import Claims
from distill.errors import ConfigError
from distill.exports.folder import export
from distill.exports.harness import harness_task
from distill.models import naming
from distill.prompts.rendering import Prompts
from distill.records import content_id
from distill.reports.page import to_html
from distill.reports.runs import read_run
from distill.reports.text import to_markdown, to_text
from distill.reports.verdicts import summarise as summary_of
from tests.conftest import compose
from tests.exports.conftest import choosing
from tests.security.conftest import ANY_TEXT, QUICK, TrainCommand, paths_below

HOSTILE_NAMES = ["", ".", "..", "../../x", "/etc/passwd", "a/../../b", "\0", "x" * 999, "．．／", "~", "~nobody/x"]


NAMES = ANY_TEXT | st.sampled_from(HOSTILE_NAMES)


@given(name=NAMES)
@QUICK
def test_a_model_name_resolves_to_a_folder_or_an_error_and_writes_nothing(name: str, tmp_path: Path) -> None:
    before = paths_below(tmp_path)
    with suppress(ConfigError):
        assert naming.resolve(name, tmp_path / "root").is_dir()
    assert paths_below(tmp_path) == before


HASHES = {"sha256": "0" * 64, "package": "1" * 64}


@pytest.mark.parametrize(
    "name",
    [
        "pypi://[",
        "pypi://a==1/../../x.gguf",
        "pypi://a==1/#package=" + "0" * 64,
        "pypi://a==1/folder#package=../../x",
        "pypi://--index-url=http://evil.example/folder#package=" + "0" * 64,
        "pypi://a==1/x.gguf#sha256=../../x&package=" + "1" * 64,
        "pypi://a==1/x.gguf#sha256=" + "0" * 64 + "&package=1%0A--index-url%20http://evil.example",
        "pypi://--index-url=http://evil.example==1/x.gguf#sha256=" + "0" * 64 + "&package=" + "1" * 64,
        "pypi://-r%20x==1/x.gguf#sha256=" + "0" * 64 + "&package=" + "1" * 64,
    ],
)
def test_a_package_name_is_accepted_only_with_version_and_hashes(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not of the form"):
        naming.resolve(name, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@given(name=NAMES)
@QUICK
def test_a_cache_stays_in_the_cache_folder_for_any_task_name(name: str, tmp_path: Path) -> None:
    config = OmegaConf.create({"root": str(tmp_path), "task": {"name": literal(name)}, "cache": {"dir": None}})
    folder, url = annotation_job.cache_location(config, tmp_path, {"a": 1}, "teacher")
    assert (folder.parent, url) == (tmp_path / "cache", None)
    folder.mkdir(parents=True, exist_ok=True)


def test_a_second_teacher_has_a_folder_beside_that_of_the_first(tmp_path: Path) -> None:
    config = OmegaConf.create({"root": "x", "task": {"name": "x"}, "cache": {"dir": str(tmp_path / "mine")}})
    folders = [annotation_job.cache_location(config, tmp_path, {}, name)[0] for name in ("teacher", "soft_teacher")]
    assert folders == [tmp_path / "mine", tmp_path / "mine-soft_teacher"]


@given(url=NAMES)
@QUICK
def test_a_copy_of_a_cache_stays_in_the_copies_folder_for_any_url(url: str, tmp_path: Path) -> None:
    config = OmegaConf.create({"root": "x", "task": {"name": "x"}, "cache": {"dir": f"s3://{literal(url)}"}})
    folder, cache_url = annotation_job.cache_location(config, tmp_path, {"a": 1}, "teacher")
    assert (folder.parent, cache_url) == (tmp_path / "copies", f"s3://{url}")
    folder.mkdir(parents=True, exist_ok=True)


def test_a_task_with_a_hostile_name_writes_below_the_root_only(
    configured: Callable[..., DictConfig], tmp_path: Path
) -> None:
    before = set(tmp_path.parent.iterdir())
    source = open_annotation_job(configured("task.name='../../../outside'", f"root={tmp_path / 'root'}"))
    with source.store.writing():
        pass
    assert source.store.has_header
    assert source.store.folder.is_relative_to(tmp_path / "root" / "cache")
    assert set(tmp_path.parent.iterdir()) == before


@given(name=NAMES)
@QUICK
def test_wandb_accepts_every_artifact_name(name: str) -> None:
    artifact = wandb.Artifact(artifact_name(f"student-{name}"), "model")
    assert "/" not in artifact.name
    assert artifact.name.startswith("student-")


@given(name=NAMES)
@QUICK
def test_an_lm_eval_task_is_written_into_its_folder_only(name: str, tmp_path: Path, prompts: Prompts) -> None:
    shutil.rmtree(tmp_path / "a", ignore_errors=True)
    (tmp_path / "a" / "model").mkdir(parents=True)
    before = paths_below(tmp_path)
    harness_task(name, prompts, choosing("yes", "no"), [], 4).write(tmp_path / "a" / "model")
    new = paths_below(tmp_path) - before
    assert len(new) == 3
    assert all(path.parent.name in ("model", "lm_eval") and path.is_relative_to(tmp_path / "a") for path in new)


@given(text=ANY_TEXT)
@QUICK
def test_an_example_id_is_hexadecimal_for_any_text(text: str) -> None:
    assert re.fullmatch(r"[0-9a-f]{32}", content_id(text))


def test_writing_replaces_a_link_instead_of_following_it(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("untouched")
    for name in ("config.yaml", "plain", ".clock", "work"):
        (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "run" / name).symlink_to(outside)
    configuration.save(compose(), tmp_path / "run" / "config.yaml")
    with atomic_write(tmp_path / "run" / "plain") as temporary:
        temporary.write_text("new")
    claims = Claims(tmp_path / "run", seconds=0.5)
    with claims.held():
        claims.take("work")
    assert outside.read_text() == "untouched"
    assert not (tmp_path / "run" / "config.yaml").is_symlink()
    assert (tmp_path / "run" / "plain").read_text() == "new"


def made_run(folder: Path) -> Path:
    """Write a minimal run folder."""
    folder.mkdir()
    (folder / "config.yaml").write_text("task: {name: t}\n")
    (folder / "run.json").write_text(json.dumps({"name": "a run", "losses": ["answer"], "seed": 0}))
    lines = [{"id": "1", "question": "Why?", "gold": "4", "student_answer": "4", "is_correct": True}]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "results.json").write_text(json.dumps({"rows": {"student": {"accuracy": 1.0, "reliability": []}}}))
    return folder


@pytest.mark.parametrize("name", ["config.yaml", "run.json", "predictions.jsonl", "rationales.jsonl"])
def test_a_report_does_not_follow_links(name: str, tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run")
    secret = '{"name": "CANARY", "losses": ["CANARY"], "question": "CANARY", "is_correct": true, "seed": "CANARY"}\n'
    (tmp_path / "secret").write_text(secret)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    run = read_run(folder)
    assert any(problem.startswith(f"{name} is a link") for problem in run.problems)
    summary = summary_of([run])
    assert "CANARY" not in to_text(summary) + to_markdown(summary) + to_html(summary)


@pytest.mark.parametrize("name", ["tokenizer.json", "id_rsa", "student"])
def test_an_export_does_not_follow_links(name: str, tmp_path: Path, student_folder: Path) -> None:
    folder = made_run(tmp_path / "run")
    shutil.copytree(student_folder, folder / "student")
    link = folder / "student" if name == "student" else folder / "student" / name
    link_target = tmp_path / "kept"
    if link.exists():
        link.rename(link_target)
    else:
        link_target.write_text("CANARY")
    link.symlink_to(link_target)
    with pytest.raises(ConfigError, match="is a link"):
        export(folder, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize("name", ["../../x", "/x", "..", ".hidden", "a/b", "x" * 300, "a\nb"])
def test_a_run_name_is_a_single_folder_name(
    name: str, train_command: TrainCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTILL_RUN", name)
    code, output = train_command()
    assert code == 2, output
    assert "expected a folder name" in output
    assert not list(tmp_path.iterdir())


def test_scheduler_ids_and_the_root_may_come_from_the_environment(
    train_command: TrainCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.delenv("SLURM_NODEID", raising=False)
    code, output = train_command("task.name='job-${oc.env:SLURM_JOB_ID}-${oc.env:SLURM_NODEID,0}'")
    assert code == 0, output
    (saved,) = (tmp_path / "root").glob("runs/*/config.yaml")
    assert "job-4711-0" in saved.read_text()
    code, output = train_command("task.name='${oc.env:SLURM_NODEID}'")
    assert code == 2, output
    assert "variable SLURM_NODEID is not set" in output
