"""What a command prints where its output is not a terminal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import environment

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
