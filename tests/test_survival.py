"""What may happen to a run from outside: signals, kills, lost processes, full memory and disks, no tracker."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from conftest import environment, start, tiny_overrides
from safetensors.torch import load_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LONG = ["loss=[answer,kl,rationale]", "batch_size=4", "trainer.max_steps=160", "checkpoint_every=10"]
LONG += ["validate_every=1000", "evaluate_before=false", "num_samples=0", "preflight=false"]
TOGETHER = ["trainer.devices=2", "trainer.strategy=ddp", "microbatch_size=2"]
SECONDS = 150  # that one process may take, on a machine that does other things too


def finished(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit code, and all that it said."""
    try:
        output, errors = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    return process.returncode, output + errors


def launch(root: Path, line: Sequence[str], **more: str) -> subprocess.Popen[str]:
    """Start a command line of any kind, with more in its environment."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(line, env=environment(**more), cwd=root, text=True, **pipes)


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    with contextlib.suppress(FileNotFoundError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def until(is_so: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Wait for something that a process does."""
    limit = time.monotonic() + SECONDS
    while not is_so():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.005)


def is_alive(pid: int) -> bool:
    """Whether a process runs: one that ended and was not asked how does not."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    return False


class Folder:
    """One run's folder, to which the same command is started again and again."""

    def __init__(self, root: Path, name: str, overrides: Sequence[str]) -> None:
        self.path, self._root = root / "runs" / name, root
        self._overrides = [*overrides, f"hydra.run.dir={self.path}"]

    def start(self, *more: str) -> subprocess.Popen[str]:
        return start(self._root, *self._overrides, *more)

    def checkpoints(self) -> list[Path]:
        return sorted((self.path / "checkpoints").glob("step-*.json"))

    def start_and_wait(self, *more: str) -> subprocess.Popen[str]:
        """Start it, and wait until it has made two more checkpoints."""
        before = self.checkpoints()[-1:]
        process = self.start(*more)
        until(lambda: len([path for path in self.checkpoints() if [path] > before]) > 1, process)
        return process

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.path / "student" / "model.safetensors")


def assert_equal(left: Folder, right: Folder) -> None:
    theirs = right.weights()
    assert all(torch.equal(value, theirs[name]) for name, value in left.weights().items())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of this module share a cache."""
    return tmp_path_factory.mktemp("survival")


@pytest.fixture(scope="module")
def overrides(root: Path, teacher_folder: Path, student_folder: Path) -> list[str]:
    return [*tiny_overrides(root, teacher_folder, student_folder), *LONG]


@pytest.fixture(scope="module")
def unbroken(root: Path, overrides: list[str]) -> Folder:
    """A run that nothing happens to."""
    folder = Folder(root, "unbroken", overrides)
    code, said = finished(folder.start())
    assert code == 0, said
    return folder


def test_a_run_that_everything_happens_to_ends_with_the_weights_of_the_unbroken_one(
    root: Path, overrides: list[str], unbroken: Folder
) -> None:
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
    code, said = finished(folder.start())
    assert code == 0, said
    assert f"{newest} is damaged" in said
    assert "going on from" in said
    assert_equal(folder, unbroken)
    assert not folder.checkpoints()

    code, said = finished(folder.start())
    assert code == 0, said
    assert "is complete" in said
    code, said = finished(folder.start("seed=1"))
    assert code == 2, said
    assert "seed was 0 and is now 1" in said


def test_several_processes_stop_together_leave_no_orphan_and_lose_nothing(root: Path, overrides: list[str]) -> None:
    whole = Folder(root, "whole-together", [*overrides, *TOGETHER])
    code, said = finished(whole.start())
    assert code == 0, said
    folder = Folder(root, "together", [*overrides, *TOGETHER])

    def strike(number: int, *, first: bool) -> int:
        process = folder.start_and_wait()
        (other,) = [pid for pid in children(process.pid) if "distill" in Path(f"/proc/{pid}/cmdline").read_text()]
        os.kill(process.pid if first else other, number)
        code, _ = finished(process)
        limit = time.monotonic() + SECONDS
        while is_alive(other):
            assert time.monotonic() < limit, "a process outlives the one that started it"
            time.sleep(0.05)
        return code

    assert strike(signal.SIGUSR1, first=False) == 85
    assert strike(signal.SIGKILL, first=True) == -9
    assert strike(signal.SIGKILL, first=False) not in (0, 85)
    code, said = finished(folder.start())
    assert code == 0, said
    assert said.count("going on from") >= 1
    assert_equal(folder, whole)
    assert len(list((root / "runs").glob("together*"))) == 1


@pytest.mark.parametrize("seconds", [0, 0.05, 0.2, 1.0, 4.0])
def test_no_signal_at_the_start_is_a_failure(
    seconds: float, root: Path, overrides: list[str], unbroken: Folder
) -> None:
    # As the batch scripts start it: what comes before Python can take note is ignored.
    line = "trap '' USR1 TERM; exec \"$@\""
    command = ["bash", "-c", line, "-", sys.executable, "-m", "distill.train", *overrides]
    command += ["trainer.max_steps=2", f"hydra.run.dir={root / 'runs' / f'early-{seconds}'}"]
    process = launch(root, command)
    time.sleep(seconds + 0.02)  # bash itself
    process.send_signal(signal.SIGUSR1)
    code, said = finished(process)
    assert code in (0, 85), said


def test_no_signal_at_the_end_is_a_failure(root: Path, overrides: list[str], unbroken: Folder) -> None:
    folder = Folder(root, "late", [*overrides, "trainer.max_steps=2"])
    process = folder.start()
    until((folder.path / "results.json").exists, process)
    while process.poll() is None:
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.001)
    code, said = finished(process)
    assert code == 0, said


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.enable_socket
def test_processes_with_different_configurations_stop_at_once(
    root: Path, overrides: list[str], unbroken: Folder
) -> None:
    port = str(free_port())
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        launch(
            root,
            [sys.executable, "-m", "distill.train", *overrides, *TOGETHER, f"optim.optimizer.lr={rate}"],
            **shared,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            TORCHELASTIC_RUN_ID="x",
            DISTILL_RUN="unlike",
        )
        for rank, rate in enumerate((0.001, 0.002))
    ]
    for process in processes:
        code, said = finished(process)
        assert code == 2, said
        assert "different configurations" in said
        assert "process 0" in said
        assert "process 1" in said


TOLD = """
from distill import config, train
work = train.main
def main(given):
    accuracy = work(given)
    print("GAVE", accuracy)
    return accuracy
train.main = main
config.command("train", main)
"""


@pytest.mark.enable_socket
def test_torchrun_gives_every_process_the_same_accuracy_and_one_folder(
    root: Path, overrides: list[str], unbroken: Folder
) -> None:
    (root / "told.py").write_text(TOLD)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port", str(free_port())]
    line = [*torchrun, str(root / "told.py"), *overrides, *TOGETHER, "trainer.max_steps=3"]
    code, said = finished(launch(root, line))
    assert code != 0
    assert "DISTILL_RUN" in said
    code, said = finished(launch(root, line, DISTILL_RUN="by-torchrun"))
    assert code == 0, said
    gave = [text.split()[-1] for text in said.splitlines() if text.startswith("GAVE")]
    assert len(gave) == 2
    assert len(set(gave)) == 1
    assert (root / "runs" / "by-torchrun" / "report.html").is_file()


SHORT_OF_MEMORY = """
import resource, sys
from distill import config, train
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
work = train.fit
def fit(*given):
    resource.setrlimit(resource.RLIMIT_AS, ((used + 300_000) * 1024, -1))
    return work(*given)
train.fit = fit
config.command("train", train.main)
"""


def test_a_full_memory_is_told_with_what_to_make_smaller(root: Path, overrides: list[str], unbroken: Folder) -> None:
    more = ["batch_size=4096", "microbatch_size=4096", "trainer.max_steps=2", "task.examples.num_unlabelled=3000"]
    more += ["loss=[answer]", f"hydra.run.dir={root / 'runs' / 'memory'}", "task.examples.num_labelled=4000"]
    line = [sys.executable, "-c", SHORT_OF_MEMORY, *overrides, *more]
    code, said = finished(launch(root, line))
    assert code == 7, said
    assert "microbatch_size=4096" in said
    assert "Traceback" not in said


SHORT_OF_DISK = """
import resource
from distill import config, train
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, -1))
config.command("train", train.main)
"""


def test_a_full_disk_leaves_no_part_of_a_checkpoint(root: Path, overrides: list[str], unbroken: Folder) -> None:
    folder = root / "runs" / "full"
    line = [sys.executable, "-c", SHORT_OF_DISK, *overrides, f"hydra.run.dir={folder}"]
    code, said = finished(launch(root, line))
    assert code == 4, said
    assert "step-00000010.ckpt" in said
    assert "Traceback" not in said
    assert not [path for path in folder.rglob("*") if "step-" in path.name]


@pytest.fixture
def deaf() -> int:
    """A port on which nobody answers."""
    return free_port()


@pytest.mark.enable_socket
def test_a_tracker_that_cannot_be_reached_stops_no_run(
    root: Path, overrides: list[str], unbroken: Folder, deaf: int
) -> None:
    folder = root / "runs" / "untracked"
    told = {"WANDB_BASE_URL": f"http://127.0.0.1:{deaf}", "WANDB_API_KEY": "0123456789" * 4, "WANDB_MODE": "online"}
    line = [sys.executable, "-m", "distill.train", *overrides, "trainer.max_steps=2", "tracking=wandb"]
    line += [f"hydra.run.dir={folder}"]
    code, said = finished(launch(root, line, **told))
    assert code == 0, said
    assert "cannot be reached" in said
    assert len(list((folder / "wandb").glob("offline-run-*/*.wandb"))) == 1
    assert "wandb sync" in said
