"""Sweeps with the Ray launcher: failed jobs are listed, and finished jobs are not repeated."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.conftest import environment, tiny_overrides

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def run_ray_sweep(root: Path, *line: str) -> tuple[int, str]:
    """Run a sweep of tiny jobs on a separate Ray; return the exit code and the output."""
    variables = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "HOME": str(root)}
    command = [sys.executable, "-m", "distill.train", "-m", "hydra/launcher=ray", *line]
    command += ["+hydra.launcher.ray.init.num_cpus=2", "+hydra.launcher.ray.init.include_dashboard=false"]
    with tempfile.TemporaryDirectory() as short_path:  # a socket path has at most 107 characters
        command += [f"+hydra.launcher.ray.init._temp_dir={short_path}"]
        process = subprocess.run(
            command, env=environment(**variables), cwd=root, capture_output=True, text=True, timeout=250, check=False
        )
    return process.returncode, process.stdout + process.stderr


@pytest.mark.enable_socket
def test_a_ray_sweep_lists_failures_and_repeats_nothing(
    tmp_path: Path, teacher_folder: Path, student_folder: Path
) -> None:
    pytest.importorskip("hydra_plugins.hydra_ray_launcher")
    tiny = [*tiny_overrides(tmp_path, teacher_folder, student_folder), "trainer.max_steps=2", "batch_size=4"]
    tiny += ["num_samples=0", "evaluate_before=false", "max_new_tokens=2", "loss=[answer,kl]"]
    sweep = tmp_path / "sweep"
    code, output = run_ray_sweep(tmp_path, *tiny, f"hydra.sweep.dir={sweep}", "student.freeze=[],[model,lm_head]")
    assert code == 2, output
    assert "job 1, exit code 2: student.freeze=[model,lm_head]\n" in output
    assert "accuracy" in json.dumps(json.loads((sweep / "0" / "results.json").read_text()))
    assert (sweep / "report.html").is_file()
    modified_ns = (sweep / "0" / "results.json").stat().st_mtime_ns
    code, output = run_ray_sweep(tmp_path, *tiny, f"hydra.sweep.dir={sweep}", "student.freeze=[],[lm_head]")
    assert "holds this run and is complete" in output
    assert (sweep / "0" / "results.json").stat().st_mtime_ns == modified_ns
    assert code == 0, output
    assert (sweep / "1" / "results.json").is_file()
