"""Runs that are signalled or killed resume with the same weights, also with another number of processes."""

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

from tests.training.conftest import MAX_SECONDS, TWO_PROCESSES, RunFolder, launch, wait_for, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def children(pid: int) -> list[int]:
    """Ids of the child processes."""
    with contextlib.suppress(FileNotFoundError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    return False


def assert_equal(left: RunFolder, right: RunFolder) -> None:
    other_weights = right.weights()
    assert all(torch.equal(value, other_weights[name]) for name, value in left.weights().items())


def test_a_run_interrupted_in_every_way_ends_with_the_uninterrupted_weights(root: Path, overrides: list[str]) -> None:
    folder = RunFolder(root, "broken", overrides)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background processes ignore it
    for signal_number, expected_code in (
        (signal.SIGTERM, 85),
        (signal.SIGKILL, -9),
        (signal.SIGUSR1, 85),
        (signal.SIGINT, 130),
    ):
        process = folder.start_and_wait()
        process.send_signal(signal_number)
        code, output = wait_for(process)
        assert code == expected_code, output
        assert ("Traceback" not in output) or expected_code == -9, output
    newest = folder.checkpoints()[-1].with_suffix(".ckpt")
    os.truncate(newest, newest.stat().st_size - 100)
    end = folder.end_soon()
    code, output = wait_for(folder.start(end))
    assert code == 0, output
    assert f"{newest} is damaged" in output
    assert "resuming from" in output
    uninterrupted = RunFolder(root, "unbroken", overrides)
    code, output = wait_for(uninterrupted.start(end))
    assert code == 0, output
    assert "resuming from" not in output
    assert_equal(folder, uninterrupted)
    assert not folder.checkpoints()

    code, output = wait_for(folder.start(end))
    assert code == 0, output
    assert "is complete" in output
    code, output = wait_for(folder.start(end, "seed=1"))
    assert code == 2, output
    assert "seed was 0 and is now 1" in output


def test_processes_stop_together_without_orphans_or_losses(root: Path, overrides: list[str]) -> None:
    folder = RunFolder(root, "together", [*overrides, *TWO_PROCESSES])

    def interrupt(signal_number: int, *, first: bool, other_hangs: bool = False) -> int:
        """Signal the first or the other of two processes; with `other_hangs` the other one is stopped before."""
        process = folder.start_and_wait()
        (other,) = [pid for pid in children(process.pid) if "distill" in Path(f"/proc/{pid}/cmdline").read_text()]
        if other_hangs:
            os.kill(other, signal.SIGSTOP)
        os.kill(process.pid if first else other, signal_number)
        deadline = time.monotonic() + MAX_SECONDS
        while is_alive(other):
            if time.monotonic() > deadline:
                os.kill(other, signal.SIGKILL)
                pytest.fail("a child process outlives its parent")
            time.sleep(0.05)
        return wait_for(process)[0]

    assert interrupt(signal.SIGUSR1, first=False) == 85
    assert interrupt(signal.SIGKILL, first=True) == -9
    assert interrupt(signal.SIGKILL, first=True, other_hangs=True) == -9
    assert interrupt(signal.SIGKILL, first=False) not in (0, 85)
    end = folder.end_soon()
    code, output = wait_for(folder.start(end))
    assert code == 0, output
    assert output.count("resuming from") >= 1
    uninterrupted = RunFolder(root, "whole", [*overrides, *TWO_PROCESSES])
    code, output = wait_for(uninterrupted.start(end))
    assert code == 0, output
    assert_equal(folder, uninterrupted)
    assert len(list((root / "runs").glob("together*"))) == 1


RECORD_STEPS = """
import json, os, signal
from pathlib import Path
from distill.app import preemption
preemption.watch()
from distill import train
from distill.app.command import command
from distill.training.module import StudentModule
original_step = StudentModule.training_step
def recording_step(module, batch):
    with Path(os.environ["NOTES"], str(os.getpid())).open("a") as notes:
        print(json.dumps([module.global_step, batch.example_ids]), file=notes)
    trainer = module.trainer
    if module.global_step == int(os.environ["LAST_STEP"]) and module.global_rank == trainer.world_size - 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    return original_step(module, batch)
StudentModule.training_step = recording_step
command("train", train.main)
"""


def examples_by_step(notes: Path) -> list[tuple[int, list[str]]]:
    """The example ids of each step, over all processes and parts of a run."""
    steps: dict[int, list[str]] = {}
    for path in notes.iterdir():
        for step, example_ids in map(json.loads, path.read_text().splitlines()):
            steps.setdefault(step, []).extend(example_ids)
    return [(step, sorted(example_ids)) for step, example_ids in sorted(steps.items())]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_run_resumed_with_another_number_of_processes_learns_the_same(
    before: int, after: int, root: Path, overrides: list[str]
) -> None:
    (root / "record_steps.py").write_text(RECORD_STEPS)

    def run_part(name: str, num_processes: int, last_step: int) -> tuple[int, str]:
        notes = root / "notes" / name
        notes.mkdir(parents=True, exist_ok=True)
        line = [sys.executable, str(root / "record_steps.py"), *overrides, "trainer.max_steps=8", "microbatch_size=2"]
        line += ["trainer.devices=2", "trainer.strategy=ddp"] * (num_processes - 1)
        line += [f"hydra.run.dir={root / 'runs' / name}", "checkpoint_every=1000", "optim.optimizer.lr=0.01"]
        return wait_for(launch(root, line, NOTES=str(notes), LAST_STEP=str(last_step)))

    name = f"{before}-then-{after}"
    for folder, num_processes, last_step, expected_code in ((f"only-{before}", before, -1, 0), (name, before, 4, 85)):
        code, output = run_part(folder, num_processes, last_step)
        assert code == expected_code, output
    code, output = run_part(name, after, -1)
    assert code == 0, output
    assert "step-00000005.ckpt" in output
    assert [step for step, _ in examples_by_step(root / "notes" / name)] == [*range(8)]
    assert examples_by_step(root / "notes" / name) == examples_by_step(root / "notes" / f"only-{before}")
    expected, actual = (RunFolder(root, run_name, []).weights() for run_name in (f"only-{before}", name))
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seconds", [0, 0.05, 0.2, 1.0, 4.0])
def test_a_signal_at_startup_is_not_a_failure(seconds: float, root: Path, overrides: list[str]) -> None:
    # Like the batch scripts: signals are ignored until Python handles them.
    started_file = root / f"started-{seconds}"
    line = f"trap '' USR1 TERM; touch {started_file}; exec \"$@\""
    command = ["bash", "-c", line, "-", sys.executable, "-m", "distill.train", *overrides]
    command += ["trainer.max_steps=2", f"hydra.run.dir={root / 'runs' / f'early-{seconds}'}"]
    process = launch(root, command)
    wait_until(started_file.exists, process)
    time.sleep(seconds)
    process.send_signal(signal.SIGUSR1)
    code, output = wait_for(process)
    assert code in (0, 85), output


def test_a_signal_during_shutdown_is_not_a_failure(root: Path, overrides: list[str]) -> None:
    folder = RunFolder(root, "late", [*overrides, "trainer.max_steps=2"])
    process = folder.start()
    wait_until((folder.path / "results.json").exists, process)
    while process.poll() is None:
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.001)
    code, output = wait_for(process)
    assert code == 0, output
