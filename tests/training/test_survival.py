"""What may happen to a run from outside: signals, kills, lost processes, full memory and disks, no tracker."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.training.conftest import SECONDS, TOGETHER, Folder, finished, launch, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    with contextlib.suppress(FileNotFoundError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def is_alive(pid: int) -> bool:
    """Whether a process runs: one that ended and was not asked how does not."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    return False


def assert_equal(left: Folder, right: Folder) -> None:
    theirs = right.weights()
    assert all(torch.equal(value, theirs[name]) for name, value in left.weights().items())


def test_a_run_interrupted_in_every_way_ends_with_the_uninterrupted_weights(root: Path, overrides: list[str]) -> None:
    folder = Folder(root, "broken", overrides)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what was started in the background ignores it
    for number, wanted in ((signal.SIGTERM, 85), (signal.SIGKILL, -9), (signal.SIGUSR1, 85), (signal.SIGINT, 130)):
        process = folder.start_and_wait()
        process.send_signal(number)
        code, said = finished(process)
        assert code == wanted, said
        assert ("Traceback" not in said) or wanted == -9, said
    newest = folder.checkpoints()[-1].with_suffix(".ckpt")
    os.truncate(newest, newest.stat().st_size - 100)
    end = folder.soon()
    code, said = finished(folder.start(end))
    assert code == 0, said
    assert f"{newest} is damaged" in said
    assert "resuming from" in said
    unbroken = Folder(root, "unbroken", overrides)
    code, said = finished(unbroken.start(end))
    assert code == 0, said
    assert "resuming from" not in said
    assert_equal(folder, unbroken)
    assert not folder.checkpoints()

    code, said = finished(folder.start(end))
    assert code == 0, said
    assert "is complete" in said
    code, said = finished(folder.start(end, "seed=1"))
    assert code == 2, said
    assert "seed was 0 and is now 1" in said


def test_processes_stop_together_without_orphans_or_losses(root: Path, overrides: list[str]) -> None:
    folder = Folder(root, "together", [*overrides, *TOGETHER])

    def strike(number: int, *, first: bool, hangs: bool = False) -> int:
        """Send a signal to the first or the other of two; where it hangs, the other answers nothing from then on."""
        process = folder.start_and_wait()
        (other,) = [pid for pid in children(process.pid) if "distill" in Path(f"/proc/{pid}/cmdline").read_text()]
        if hangs:
            os.kill(other, signal.SIGSTOP)
        os.kill(process.pid if first else other, number)
        limit = time.monotonic() + SECONDS
        while is_alive(other):
            if time.monotonic() > limit:
                os.kill(other, signal.SIGKILL)
                pytest.fail("a process outlives the one that started it")
            time.sleep(0.05)
        return finished(process)[0]

    assert strike(signal.SIGUSR1, first=False) == 85
    assert strike(signal.SIGKILL, first=True) == -9
    assert strike(signal.SIGKILL, first=True, hangs=True) == -9
    assert strike(signal.SIGKILL, first=False) not in (0, 85)
    end = folder.soon()
    code, said = finished(folder.start(end))
    assert code == 0, said
    assert said.count("resuming from") >= 1
    whole = Folder(root, "whole", [*overrides, *TOGETHER])
    code, said = finished(whole.start(end))
    assert code == 0, said
    assert_equal(folder, whole)
    assert len(list((root / "runs").glob("together*"))) == 1


NOTED = """
import json, os, signal
from pathlib import Path
from distill.app import preemption
preemption.watch()
from distill import train
from distill.app.command import command
from distill.training.module import StudentModule
work = StudentModule.training_step
def noted(module, batch):
    with Path(os.environ["NOTES"], str(os.getpid())).open("a") as notes:
        print(json.dumps([module.global_step, batch.example_ids]), file=notes)
    trainer = module.trainer
    if module.global_step == int(os.environ["LAST_STEP"]) and module.global_rank == trainer.world_size - 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    return work(module, batch)
StudentModule.training_step = noted
command("train", train.main)
"""


def learned(notes: Path) -> list[tuple[int, list[str]]]:
    """The examples of each step, in all processes of all parts of a run."""
    steps: dict[int, list[str]] = {}
    for path in notes.iterdir():
        for step, example_ids in map(json.loads, path.read_text().splitlines()):
            steps.setdefault(step, []).extend(example_ids)
    return [(step, sorted(example_ids)) for step, example_ids in sorted(steps.items())]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_run_resumed_with_another_number_of_processes_learns_the_same(
    before: int, after: int, root: Path, overrides: list[str]
) -> None:
    (root / "noted.py").write_text(NOTED)

    def part(name: str, number: int, last_step: int) -> tuple[int, str]:
        notes = root / "notes" / name
        notes.mkdir(parents=True, exist_ok=True)
        line = [sys.executable, str(root / "noted.py"), *overrides, "trainer.max_steps=8", "microbatch_size=2"]
        line += ["trainer.devices=2", "trainer.strategy=ddp"] * (number - 1)
        line += [f"hydra.run.dir={root / 'runs' / name}", "checkpoint_every=1000", "optim.optimizer.lr=0.01"]
        return finished(launch(root, line, NOTES=str(notes), LAST_STEP=str(last_step)))

    name = f"{before}-then-{after}"
    for folder, number, last_step, wanted in ((f"only-{before}", before, -1, 0), (name, before, 4, 85)):
        code, said = part(folder, number, last_step)
        assert code == wanted, said
    code, said = part(name, after, -1)
    assert code == 0, said
    assert "step-00000005.ckpt" in said
    assert [step for step, _ in learned(root / "notes" / name)] == [*range(8)]
    assert learned(root / "notes" / name) == learned(root / "notes" / f"only-{before}")
    whole, found = (Folder(root, each, []).weights() for each in (f"only-{before}", name))
    for key, value in whole.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seconds", [0, 0.05, 0.2, 1.0, 4.0])
def test_a_signal_at_startup_is_not_a_failure(seconds: float, root: Path, overrides: list[str]) -> None:
    # As the batch scripts start it: what comes before Python can take note is ignored.
    begun = root / f"begun-{seconds}"
    line = f"trap '' USR1 TERM; touch {begun}; exec \"$@\""
    command = ["bash", "-c", line, "-", sys.executable, "-m", "distill.train", *overrides]
    command += ["trainer.max_steps=2", f"hydra.run.dir={root / 'runs' / f'early-{seconds}'}"]
    process = launch(root, command)
    until(begun.exists, process)
    time.sleep(seconds)
    process.send_signal(signal.SIGUSR1)
    code, said = finished(process)
    assert code in (0, 85), said


def test_a_signal_during_shutdown_is_not_a_failure(root: Path, overrides: list[str]) -> None:
    folder = Folder(root, "late", [*overrides, "trainer.max_steps=2"])
    process = folder.start()
    until((folder.path / "results.json").exists, process)
    while process.poll() is None:
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.001)
    code, said = finished(process)
    assert code == 0, said
