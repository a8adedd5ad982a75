"""Makers that the tests of this folder share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from distill.app.command import command

WHOLE = ("task=arithmetic", "teacher=causal_lm", "student=causal_lm", "teacher.model=x", "student.model=x")
MADE_RANKS = ("LOCAL_RANK", "RANK", "GROUP_RANK", "SLURM_PROCID", "TORCHELASTIC_RUN_ID")


def inspected(folder: str, *options: str) -> list[Any]:
    """What W&B's own reader finds in a run."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *options, folder]
    environment = os.environ | {"WANDB_ERROR_REPORTING": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    return [json.loads(line) for line in ([done.stdout] if options else done.stdout.splitlines())]


def exit_code(work: Callable[[DictConfig], Any]) -> Any:
    """Run the train command with the arguments of this process and work of a test's own."""
    GlobalHydra.instance().clear()
    try:
        command("train", work)
    except SystemExit as stopped:
        return stopped.code
    return 0


@pytest.fixture
def swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Sweep over the train configuration with work of a test's own; return the exit code and what was printed."""

    def swept(work: Callable[[DictConfig], Any], *arguments: str) -> tuple[Any, str]:
        monkeypatch.setattr(sys, "argv", ["train", "-m", *WHOLE, f"root={tmp_path}", *arguments])
        return exit_code(work), capsys.readouterr().err

    for name in MADE_RANKS:
        monkeypatch.delenv(name, raising=False)
    return swept
