"""A command answers at once: heavy packages are imported only after the configuration is composed and checked."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from distill.app.config import CONF
from distill.app.help import help_text
from tests.conftest import environment

HEAVY = {
    "torch",
    "lightning",
    "wandb",
    "transformers",
    "pydantic",
    "datasets",
    "pyarrow",
    "numpy",
    "scipy",
    "sklearn",
    "jinja2",
}
COMMANDS = ("annotate", "evaluate", "export", "judge", "report", "train")


def imported(lines: Iterable[str]) -> set[str]:
    """The heavy packages among those that `python -X importtime` lists."""
    names = (line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:"))
    return {name.partition(".")[0] for name in names} & HEAVY


def completing(line: str) -> dict[str, str]:
    """What Bash sets when it completes a line."""
    return {"COMP_LINE": line, "COMP_POINT": str(len(line))}


def timed(root: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python to its end and list its imports on standard error."""
    line = [sys.executable, "-X", "importtime", *arguments]
    return subprocess.run(
        line, env=environment(**variables), cwd=root, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--cfg", "job"], 0),
        (["--cfg", "job", "seed=1"], 0),
        (["sead=1"], 2),
        (["seed=many"], 2),
        (["-sc", "query=bash"], 0),
        (["-sc", "install=bash"], 0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_composing_a_configuration_imports_nothing_heavy(
    command: str, arguments: list[str], code: int, tmp_path: Path
) -> None:
    done = timed(tmp_path, "-m", f"distill.{command}", *arguments, **completing("train see"))
    assert done.returncode == code, done.stderr
    assert done.stdout or code
    assert not imported(done.stderr.splitlines())
    assert not list(tmp_path.iterdir())


def test_a_misspelt_option_imports_nothing_heavy(tmp_path: Path) -> None:
    done = timed(tmp_path, "-m", "distill.train", "teacher=nothing")
    assert done.returncode == 2
    assert "teacher=nothing" in done.stderr
    assert not imported(done.stderr.splitlines())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_the_first_line_of_a_run_comes_before_heavy_imports(command: str, tmp_path: Path) -> None:
    line = [sys.executable, "-X", "importtime", "-m", f"distill.{command}", f"root={tmp_path}"]
    with subprocess.Popen(line, env=environment(), cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        before = []
        assert process.stderr
        for text in process.stderr:
            if not text.startswith("import time:"):
                break
            before.append(text)
        process.kill()
    assert text.startswith(f"{command}: run folder {tmp_path / 'runs'}{os.sep}")
    assert "loading libraries" in text
    assert before
    assert not imported(before)


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_read_from_the_comments_of_the_configuration(flag: str, tmp_path: Path) -> None:
    done = timed(tmp_path, "-m", "distill.report", "runs=x", flag)
    assert done.stdout == help_text(CONF, "report") + "\n"


def test_help_into_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    line = [sys.executable, "-m", "distill.report", "--help"]
    done = subprocess.run(
        line, env=environment(), cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_completion_lists_the_options_of_a_group(tmp_path: Path) -> None:
    done = timed(tmp_path, "-m", "distill.train", "-sc", "query=bash", **completing("train teacher="))
    assert {"teacher=recorded", "teacher=causal_lm"} <= set(done.stdout.split())


def test_importing_the_package_imports_only_the_standard_library(tmp_path: Path) -> None:
    code = "import sys, distill; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-S", "-c", code], env=environment(), capture_output=True, text=True)
    assert set(done.stdout.split()) - set(sys.stdlib_module_names) <= {"distill", "__main__"}
    assert "distill" in done.stdout.split()


@pytest.mark.parametrize(
    "code",
    [
        "from distill.app.console import say; say('a line')",
        "from distill.app.tracking import NoTracking as T; t = T(); t.summary({}); t.loggers(); t.finish(0)",
        "import distill.app.tracking, distill.app.sweeps, distill.reports.after_sweep",
    ],
)
def test_say_callbacks_and_no_tracking_import_neither_wandb_nor_lightning(code: str, tmp_path: Path) -> None:
    done = timed(tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    assert not imported(done.stderr.splitlines())
