"""Makers that the tests of this folder share."""

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


class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self._marker),)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """A place that is written by hostile code alone."""
    path = tmp_path / "hostile code ran"
    yield path
    assert not path.exists()


def written(folder: Path) -> set[Path]:
    """Everything below a folder."""
    return set(folder.rglob("*"))


Told = Callable[..., tuple[Any, str]]


def commanded(name: str, work: Callable[[DictConfig], Any]) -> tuple[Any, str]:
    """Run a command in this process: its exit code, and what it said."""
    said, code = io.StringIO(), 0
    with redirect_stderr(said), redirect_stdout(said):
        try:
            command(name, work)
        except SystemExit as stopped:
            code = stopped.code or 0
    return code, said.getvalue()


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Told:
    """Give a command line to the train command; it is checked and saved, and not run. Exit code and what was said."""

    def work(config: DictConfig) -> None:
        configuration.check(config)
        configuration.save(config, configuration.run_dir() / "config.yaml")

    def told(*arguments: str) -> tuple[Any, str]:
        GlobalHydra.instance().clear()
        common = ["task=arithmetic", "tracking=off", f"root={tmp_path / 'root'}"]
        flags = [word for word in arguments if word == "-m"]
        monkeypatch.setattr(sys, "argv", ["train", *flags, *common, *(word for word in arguments if word != "-m")])
        return commanded("train", work)

    return told
