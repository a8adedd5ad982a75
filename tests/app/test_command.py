"""What a command prints where its output is not a terminal, and what a refused one leaves behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from distill.app.config import run_dir
from distill.errors import CacheError, ConfigError, DistillError
from distill.train import main as training
from tests.app.conftest import WHOLE, exit_code
from tests.conftest import environment, tiny_overrides

WITH_BARS = """
from distill.app.command import command

def work(config):
    from huggingface_hub.utils import tqdm as hub_bar
    from tqdm.auto import tqdm
    list(tqdm(range(3), desc="bar"))
    list(hub_bar(range(3), desc="bar of the hub"))
    print("worked")

work.__module__ = "elsewhere"
command("train", work)
"""


@pytest.mark.slow
def test_a_log_has_no_progress_bars_of_libraries(tmp_path: Path) -> None:
    line = [sys.executable, "-c", WITH_BARS, f"root={tmp_path}"]
    done = subprocess.run(
        line, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert "worked" in done.stdout, done.stderr
    first, *others = done.stderr.splitlines()
    assert first.startswith("train: run folder ")
    assert others == []


@pytest.mark.parametrize("refusal", [ConfigError("wrong"), CacheError("other teacher")], ids=type)
def test_a_refused_run_leaves_no_folder_unless_it_holds_files(
    refusal: DistillError, single: Callable[..., Any], tmp_path: Path
) -> None:
    def refuse(config: DictConfig) -> None:
        raise refusal

    def refuse_later(config: DictConfig) -> None:
        (run_dir() / "config.yaml").touch()
        raise refusal

    assert single(refuse) == refusal.exit_code
    assert not list((tmp_path / "runs").iterdir())
    assert single(refuse_later, "hydra.run.dir=" + str(tmp_path / "mine")) == refusal.exit_code
    assert single(refuse, "hydra.run.dir=" + str(tmp_path / "mine")) == refusal.exit_code
    assert (tmp_path / "mine" / "config.yaml").exists()


@pytest.mark.parametrize(
    "override",
    [
        "student.model=/nonexistent",
        "teacher.model=/nonexistent",
        "+trainer.max_epochs=1",
        "objective=accuracy",
        r'task.layout.answer_cue="A:\n"',
        "student.keep_layers=[7]",
    ],
)
def test_settings_refused_by_the_training_leave_no_folder(
    override: str, single: Callable[..., Any], tmp_path: Path, teacher_folder: Path, student_folder: Path
) -> None:
    tiny = [o for o in tiny_overrides(tmp_path, teacher_folder, student_folder) if "root=" not in o]
    assert single(training, *tiny, override) == 2
    assert not list((tmp_path / "runs").iterdir())
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def single(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run one job of the train configuration; return the exit code."""

    def single(work: Callable[[DictConfig], Any], *arguments: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["train", *WHOLE, f"root={tmp_path}", *arguments])
        return exit_code(work)

    return single
