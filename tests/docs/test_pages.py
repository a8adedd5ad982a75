"""What the pages say is so: their commands run, and what they name exists."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distill.app import config as configuration
from distill.app.overrides import check_command_line
from tests.conftest import environment
from tests.docs.conftest import (
    PAGES,
    ROOT,
    Command,
    commands,
    composed,
    files_of,
    made_small,
    module_of,
    write_files,
)

# Commands that are not run here, by how they begin, and why. Their overrides are composed and checked all the same.
NOT_RUN = {
    "scripts/demo": "downloads models; .ci/run of a fresh clone and users run it",
    "scripts/test": "would run itself",
    "scripts/check": "continuous integration runs it beside the tests",
    "cd my-chat-model": "needs lm-eval, in an environment of its own",
    "scripts/benchmark": "takes minutes to an hour, and downloads models",
    "export PIP_EXTRA_INDEX_URL": "a setting of pip",
    "pip install": "needs an index",
    "wandb sweep": "needs an account; tests/app/test_sweeps.py runs what an agent would run",
    "sbatch": "needs Slurm; tests/system/test_slurm.py submits the same scripts",
    "scripts/slurm/pipeline": "needs Slurm; tests/system/test_slurm.py submits the same scripts",
    "docker": "needs a builder; tests/system/test_container.py builds and runs the image",
    "kubectl": "needs a cluster; tests/system/test_manifests.py checks the manifests",
    "sky": "needs a cloud; tests/system/test_manifests.py checks the task",
    "python -m distill.annotate root=s3://": "needs a bucket; tests/cache/test_remote.py has a server",
    "python -m distill.export run=distill-data/runs/first to=my-llama 'format=": "needs an index for the converter, "
    "and a tokenizer that it knows; tests/exports/test_gguf.py has both",
    "python -m distill.train -m seed=0,1,2,3 hydra/launcher=slurm": "needs Slurm; tests/system/test_slurm.py has one",
}
# Sweeps, shortened: a word of the command, and what is put in its place.
SHORTER = {"seed=0,1,2,3,4": "seed=0", "seed=0,1,2,3": "seed=0,1", "seed=0,1,2": "seed=0", "seed=0,1": "seed=0"}
SHORTER |= {"task.examples.fold=0,1,2,3,4": "task.examples.fold=0,3"}
MORE = {
    "experiment=search": ["hydra.sweeper.n_trials=2"],
    "experiment=compare": ["seed=0"],
    "batch_unit=tokens": ["batch_size=512", "microbatch_size=256"],
}
NEED_RUNS = ("reading-the-report.md",)  # pages that read what the quick start made
RUNNABLE = [command for command in commands() if not any(command.line.startswith(start) for start in NOT_RUN)]
OWN_FILES = "adding-a-part.md"
COMPOSED = [command for command in commands() if command.name and command.page != OWN_FILES]


def run(command: Command, folder: Path, source: Path = ROOT) -> str:
    """Run a command of a page in a folder, with small models and few steps; "" if it ended well, else what it said."""
    words = [SHORTER.get(word, word) for word in command.words]
    if command.name and "--help" not in words:
        known = replace(command, line=command.line.replace("hellinger", "kl"))  # what this source has too
        words += made_small(known)
        words += [word for key, more in MORE.items() if key in words for word in more]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    shown = environment(PATH=path, **dict(variable.split("=", 1) for variable in command.variables))
    shown["PYTHONPATH"] = str(source)
    pipes = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    done = subprocess.run(words, cwd=folder, env=shown, timeout=200, **pipes)
    said = f"{command.line}\n{shlex.join(words)}\n{done.stdout[-1500:]}\n{done.stderr[-2500:]}"
    return said if done.returncode else ""


@pytest.fixture(scope="session")
def quick_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the runs of the quick start are, with the files that the pages call my/…."""
    folder = tmp_path_factory.mktemp("quick-start")
    write_files(folder)
    for command in RUNNABLE:
        if command.page == "index.md" and ("DISTILL_RUN=first" in command.line or "sweep.dir" in command.line):
            assert run(command, folder) == ""
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", sorted({command.page for command in RUNNABLE} - {OWN_FILES}))
def test_every_command_of_a_page_runs(page: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = tmp_path / "here"
    if page in NEED_RUNS:
        shutil.copytree(request.getfixturevalue("quick_start"), folder)
    else:
        write_files(folder)
    said = [run(command, folder) for command in RUNNABLE if command.page == page]
    assert not any(said), "\n\n".join(filter(None, said))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_part_is_added_as_the_page_says(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("distill", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name, content in files_of(OWN_FILES).items():
        (source / name).write_text(content)
    write_files(tmp_path)
    assert [run(command, tmp_path, source) for command in RUNNABLE if command.page == OWN_FILES] == [""]


def test_the_loss_that_the_page_adds_has_the_slope_that_it_gives(tmp_path: Path) -> None:
    path = tmp_path / "hellinger.py"
    path.write_text(files_of(OWN_FILES)["distill/losses/hellinger.py"])
    loss = module_of(path).Hellinger()
    log_q = torch.randn(5, 7, dtype=torch.float64).log_softmax(-1).requires_grad_()
    log_t = torch.randn(5, 7, dtype=torch.float64).log_softmax(-1)
    value, slope = loss(log_q, log_t)
    torch.testing.assert_close(slope, torch.autograd.grad(value.sum(), log_q)[0])
    torch.testing.assert_close(value.sum(-1), 1 - ((log_q + log_t) / 2).exp().sum(-1))


@pytest.mark.parametrize("command", COMPOSED, ids=lambda command: f"{command.page}: {command.line[:90]}")
def test_the_overrides_of_every_command_compose_and_pass_the_check(command: Command) -> None:
    assert command.name
    check_command_line(command.name, command.overrides)
    if "--help" not in command.overrides:
        configuration.check(composed(command))


def test_commands_that_are_not_run_are_on_the_pages() -> None:
    lines = [command.line for command in commands()]
    assert [start for start in NOT_RUN if not any(line.startswith(start) for line in lines)] == []
    assert [word for word in MORE if not any(word in line for line in lines)] == []


def test_every_page_is_read() -> None:
    without_commands = {"how-it-works.md", "families.md"}
    assert {command.page for command in commands()} >= PAGES.keys() - without_commands


def test_the_tests_that_the_laws_name_exist() -> None:
    sources = [ast.parse(path.read_text()) for path in (ROOT / "tests").rglob("test_*.py")]
    names = {node.name for source in sources for node in ast.walk(source) if isinstance(node, ast.FunctionDef)}
    named = set(re.findall(r"`(test_\w+)`", PAGES["how-it-works.md"]))
    assert len(named) > 30
    assert named - names == set()


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page: str) -> None:
    written = files_of(page)
    named = re.findall(r"(?<![\w./-])((?:distill|conf|scripts|tests|docs|benchmarks)/[\w./-]*\w/?)", PAGES[page])
    assert [name for name in named if name not in written and not (ROOT / name).exists()] == []


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 160


def test_every_figure_of_a_page_names_a_commit_that_is_in_the_history() -> None:
    git = shutil.which("git")
    if not git or not (ROOT / ".git").exists():
        pytest.skip("this is no clone")
    is_shallow = subprocess.run([git, "rev-parse", "--is-shallow-repository"], cwd=ROOT, capture_output=True, text=True)
    if is_shallow.stdout.strip() != "false":
        pytest.skip("this clone has no history")
    for page, text in PAGES.items():
        for commit in re.findall(r"commits?\s+([0-9a-f]{7})\b", text):
            known = subprocess.run([git, "cat-file", "-e", f"{commit}^{{commit}}"], cwd=ROOT, capture_output=True)
            assert known.returncode == 0, f"{page}: {commit}"
