"""Benchmarks on tiny models, so that their smallest cases take seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from omegaconf import DictConfig

from benchmarks import material, measure
from distill.app import config as configuration
from tests.conftest import tiny_overrides


@pytest.fixture
def solutions_file(tmp_path: Path) -> Path:
    """Questions and solutions in the format of GSM8K, with a line separator inside a JSON string."""
    rows = [{"question": f"What is {i} and\u2028{i}?", "answer": f"It is 2 x {i}.\n#### {2 * i}"} for i in range(48)]
    path = tmp_path / "solutions.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def saved_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder to which `measure.save` writes in this test."""
    monkeypatch.setattr(measure, "FOLDER", tmp_path)
    return tmp_path


@pytest.fixture
def _tiny_material(tmp_path: Path, teacher_folder: Path, student_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the default task and models of all benchmarks by tiny ones."""
    tiny = tiny_overrides(tmp_path, teacher_folder, student_folder)
    tiny = [override for override in tiny if not override.startswith(("cache", "trainer.precision"))]

    def compose(*overrides: str) -> DictConfig:
        return configuration.compose("train", [*tiny, *overrides])

    monkeypatch.setattr(material, "compose", compose)
