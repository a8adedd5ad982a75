"""Fixtures and helpers shared by the tests of this folder."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from omegaconf import DictConfig

from distill.app import config as configuration
from distill.app.command import command

ROOT = Path(configuration.__file__).parents[2]


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)


QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class MakesFolderWhenUnpickled:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self._folder),)


@pytest.fixture
def hostile_marker(tmp_path: Path) -> Iterator[Path]:
    """A path that only hostile code would create."""
    path = tmp_path / "hostile code ran"
    yield path
    assert not path.exists()


def paths_below(folder: Path) -> set[Path]:
    """All paths below a folder."""
    return set(folder.rglob("*"))


TrainCommand = Callable[..., tuple[Any, str]]


def run_in_process(name: str, work: Callable[[DictConfig], Any]) -> tuple[Any, str]:
    """Run a command in this process; return its exit code and its output."""
    output, code = io.StringIO(), 0
    with redirect_stderr(output), redirect_stdout(output):
        try:
            command(name, work)
        except SystemExit as stopped:
            code = stopped.code or 0
    return code, output.getvalue()


@pytest.fixture
def train_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> TrainCommand:
    """Check and save the configuration of a train command line without training; return exit code and output."""

    def work(config: DictConfig) -> None:
        configuration.check(config)
        configuration.save(config, configuration.run_dir() / "config.yaml")

    def train_command(*arguments: str) -> tuple[Any, str]:
        GlobalHydra.instance().clear()
        common = ["task=arithmetic", "tracking=off", f"root={tmp_path / 'root'}"]
        flags = [argument for argument in arguments if argument == "-m"]
        monkeypatch.setattr(
            sys, "argv", ["train", *flags, *common, *(argument for argument in arguments if argument != "-m")]
        )
        return run_in_process("train", work)

    return train_command
