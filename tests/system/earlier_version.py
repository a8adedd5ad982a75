"""Make a cache and two run folders, one finished and one interrupted, with the code of an earlier commit.

    python tests/system/earlier_version.py FOLDER

The code comes from this repository's history, so nothing made by it has to be kept in the repository, and the
material fits the installed torch and transformers, whose versions are part of a cache's fingerprint. This file lies
among the tests and not in `scripts/` because only tests need what it makes. It imports neither `distill` nor
`tests.conftest`: the earlier commit brings its own.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
COMMIT = "d12e694875d930fd99de5cb96e0a44b371c1edc4"  # the last one in which all modules lay directly in distill/
PARTS = ("distill", "conf", "tests/conftest.py")
TIMEOUT_SECONDS = 120
STOPPED = 85  # the exit code of a run that was stopped and saved its state

MODELS = """
import sys
from pathlib import Path
from conftest import make_model
for seed, folder in enumerate(sys.argv[1:], start=1):
    make_model(Path(folder), seed=seed)
"""
# What the train command of that commit took; later versions of `conf/` and `conftest.py` must not change it.
OVERRIDES = (
    "task=jsonl",
    "task.choices=[negative,positive]",
    "task.rationale=why",
    *(f"task.examples.num_{split}=6" for split in ("labelled", "unlabelled", "validation", "test")),
    "teacher=causal_lm",
    "teacher.kind.dtype=float32",
    "teacher.kind.max_new_tokens=6",
    "teacher.batch_size=5",
    "teacher.calibrate=0",
    "student=causal_lm",
    "task.examples.shots=[{question:It is dull.,rationale:Dull is blame.,answer:negative}]",
    "prompt.num_shots=1",
    "rationales=all",
    "cache=topk",
    "cache.codec.k=8",
    "loss=[answer,kl,rationale]",
    "batch_size=4",
    "max_new_tokens=6",
    "num_samples=2",
    "checkpoint_every=1",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=1",
    "trainer.precision=32-true",
    "tracking=off",
)


@dataclass(frozen=True)
class Material:
    """What the earlier code has left below `root`, and the overrides with which its train command was run."""

    root: Path
    overrides: tuple[str, ...]

    @property
    def finished(self) -> Path:
        """A run of three steps that ended."""
        return self.root / "runs" / "finished"

    @property
    def interrupted(self) -> Path:
        """A run that was stopped between two steps and left checkpoints."""
        return self.root / "runs" / "interrupted"

    def command(self, run_dir: Path) -> tuple[str, ...]:
        """The arguments of the train command for a run in this folder."""
        return (*self.overrides, f"hydra.run.dir={run_dir}")


def is_in_history() -> bool:
    """Whether git is here and the repository holds the commit; a shallow clone and a source archive do not."""
    if shutil.which("git") is None:
        return False
    done = subprocess.run(_git("cat-file", "-e", f"{COMMIT}^{{commit}}"), capture_output=True, check=False)
    return done.returncode == 0


def make(root: Path) -> Material:
    """Extract the commit's code and run it: two models, a cache, a finished and an interrupted run."""
    material = Material(root, _overrides(root))
    code = root / "code"
    archive = subprocess.run(_git("archive", COMMIT, *PARTS), capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(code, filter="data")
    (root / "rows.jsonl").write_text("".join(map(_row, range(40))))
    _finish(_start(code, "-c", MODELS, str(root / "teacher"), str(root / "student")))
    _finish(_train(code, *material.command(material.finished), "trainer.max_steps=3"))
    _interrupt(_train(code, *material.command(material.interrupted), "trainer.max_steps=100000"), material.interrupted)
    return material


def _overrides(root: Path) -> tuple[str, ...]:
    models = f"teacher.model={root / 'teacher'}", f"student.model={root / 'student'}"
    return (*OVERRIDES, *models, f"task.path={root / 'rows.jsonl'}", f"root={root}")


def _row(index: int) -> str:
    answer, word = ("positive", "praise") if index % 2 else ("negative", "blame")
    return json.dumps({"question": f"Sentence {index} rates it.", "answer": answer, "why": f"It is {word}."}) + "\n"


def _git(*arguments: str) -> list[str]:
    return ["git", "-C", str(REPOSITORY), *arguments]


def _train(code: Path, *arguments: str) -> subprocess.Popen[str]:
    return _start(code, "-m", "distill.train", *arguments)


def _start(code: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start Python where `distill` and `conftest` are those of the earlier commit."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "DISTILL"))}
    paths = os.pathsep.join((str(code), str(code / "tests")))
    more = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    # -P: the working directory, which may hold another `distill`, does not go before PYTHONPATH.
    return subprocess.Popen([sys.executable, "-P", *arguments], env=kept | more, cwd=code, text=True, **pipes)


def _finish(process: subprocess.Popen[str], expected: int = 0) -> None:
    """Wait for a process; RuntimeError with its last lines where it ends in another way than expected."""
    try:
        _, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    finally:
        process.kill()
    if process.returncode != expected:
        raise RuntimeError(f"exit code {process.returncode}, expected {expected}: {errors[-2000:]}")


def _interrupt(process: subprocess.Popen[str], run_dir: Path) -> None:
    """Stop a run once it has saved a checkpoint."""
    end = time.monotonic() + TIMEOUT_SECONDS
    while not list(run_dir.glob("checkpoints/step-*.json")) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _finish(process, STOPPED)


if __name__ == "__main__":
    made = make(Path(sys.argv[1]).resolve())
    print(f"finished     {made.finished}\ninterrupted  {made.interrupted}\ncache        {made.root / 'cache'}")
