"""The evaluate command reads as many questions at a time as its settings say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from distill.app import config as configuration
from distill.errors import ConfigError
from distill.evaluation.job import evaluate
from distill.models.reading import PrefixedReader
from tests.conftest import compose


def overrides(folder: Path, root: Path, *changes: str) -> Any:
    task = ["task=arithmetic", "task.examples.num_test=7", "task.examples.num_unlabelled=4", "max_new_tokens=2"]
    return compose(f"model={folder}", f"root={root}", *task, *changes, name="evaluate")


@pytest.mark.parametrize(
    ("changes", "largest"), [(["microbatch_size=3"], 3), (["microbatch_size=1", "batch_unit=tokens"], 1), ([], 7)]
)
def test_predictions_are_made_in_batches_of_the_configured_size(
    changes: list[str], largest: int, student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, read = list[int](), PrefixedReader.read

    def counted(self: PrefixedReader, prompts: Sequence[Sequence[int]]) -> Any:
        sizes.append(len(prompts))
        return read(self, prompts)

    monkeypatch.setattr(PrefixedReader, "read", counted)
    monkeypatch.setattr(configuration, "run_dir", lambda: tmp_path)
    evaluate(overrides(student_folder, tmp_path, *changes))
    assert max(sizes) == largest
    assert sum(sizes[: -(-7 // largest)]) == 7


@pytest.mark.parametrize(
    ("change", "problem"),
    [("microbatch_size=0", "expected at least 1"), ("batch_unit=rows", "expected examples or tokens")],
)
def test_a_batch_that_cannot_be_is_refused(change: str, problem: str, student_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{change}: {problem}"):
        evaluate(overrides(student_folder, tmp_path, change))
