"""What may happen to a run from outside: signals, kills, lost processes, full memory and disks, no tracker."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import environment, start, tiny_overrides
from safetensors.torch import load_file, save_file

from distill.prompts.tokenizers import load_tokenizer
from distill.records import content_id
from distill.training.checkpoints import step_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

ALIKE = ["loss=[answer,kl,rationale]", "batch_size=4", "checkpoint_every=10", "validate_every=1000"]
ALIKE += ["evaluate_before=false", "num_samples=0", "preflight=false"]
ALIKE += ["optim.schedule.num_training_steps=1000000"]  # so the weights after a step are the same however many follow
ENDLESS = "trainer.max_steps=1000000"  # of a run that is to be struck: it cannot end before it is
TOGETHER = ["trainer.devices=2", "trainer.strategy=ddp", "microbatch_size=2"]
SECONDS = 300  # that one process may take, on a machine that does other things too


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
        if time.monotonic() > limit:
            process.kill()
            pytest.fail(f"waited in vain: {process.communicate()}")
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
        """Start it without an end, and wait until it has made two more checkpoints."""
        before = self.checkpoints()[-1:]
        process = self.start(*more, ENDLESS)
        until(lambda: len([path for path in self.checkpoints() if [path] > before]) > 1, process)
        return process

    def soon(self) -> str:
        """What lets it end, some steps after its newest checkpoint."""
        return f"trainer.max_steps={step_of(self.checkpoints()[-1]) + 15}"

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
    """What the runs have in common; their cache is filled."""
    alike = [*tiny_overrides(root, teacher_folder, student_folder), *ALIKE]
    code, said = finished(start(root, *alike, "trainer.max_steps=1"))
    assert code == 0, said
    return alike


def test_a_run_that_everything_happens_to_ends_with_the_weights_of_the_unbroken_one(
    root: Path, overrides: list[str]
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
    end = folder.soon()
    code, said = finished(folder.start(end))
    assert code == 0, said
    assert f"{newest} is damaged" in said
    assert "going on from" in said
    unbroken = Folder(root, "unbroken", overrides)
    code, said = finished(unbroken.start(end))
    assert code == 0, said
    assert "going on from" not in said
    assert_equal(folder, unbroken)
    assert not folder.checkpoints()

    code, said = finished(folder.start(end))
    assert code == 0, said
    assert "is complete" in said
    code, said = finished(folder.start(end, "seed=1"))
    assert code == 2, said
    assert "seed was 0 and is now 1" in said


def test_several_processes_stop_together_leave_no_orphan_and_lose_nothing(root: Path, overrides: list[str]) -> None:
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
    assert said.count("going on from") >= 1
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
def test_a_run_that_goes_on_with_another_number_of_processes_learns_the_same(
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
def test_no_signal_at_the_start_is_a_failure(seconds: float, root: Path, overrides: list[str]) -> None:
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


def test_no_signal_at_the_end_is_a_failure(root: Path, overrides: list[str]) -> None:
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


def run_ranks(root: Path, name: str, *lines: Sequence[str]) -> list[tuple[int, str]]:
    """Run the processes of one run as torchrun would, each with overrides of its own; how each ended."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "DISTILL_RUN": name}
    shared |= {"WORLD_SIZE": str(len(lines)), "LOCAL_WORLD_SIZE": str(len(lines)), "TORCHELASTIC_RUN_ID": "x"}
    processes = [
        launch(root, [sys.executable, "-m", "distill.train", *line], **shared, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank, line in enumerate(lines)
    ]
    try:
        return [finished(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.enable_socket
def test_processes_with_different_configurations_stop_at_once(root: Path, overrides: list[str]) -> None:
    line = [*overrides, *TOGETHER, "trainer.max_steps=5"]
    for code, said in run_ranks(root, "unlike", *([*line, f"optim.optimizer.lr={rate}"] for rate in (0.001, 0.002))):
        assert code == 2, said
        assert "different configurations" in said
        assert "process 0" in said
        assert "process 1" in said


MARK = "@"  # a token of its own, of which the student's embedding is not a number


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory, student_folder: Path) -> Path:
    """A student that makes numbers of all texts but those with a mark."""
    folder = tmp_path_factory.mktemp("marked") / "student"
    shutil.copytree(student_folder, folder)
    (mark,) = load_tokenizer(folder).encode(MARK, add_special_tokens=False)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][mark] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.enable_socket
@pytest.mark.parametrize("rank", [0, 1])
def test_a_loss_that_is_not_finite_in_one_process_stops_all_before_the_step(
    rank: int, tmp_path: Path, teacher_folder: Path, marked: Path
) -> None:
    # Short ones come first: the examples 8 to 11 make the third step, of which each process has two.
    questions = [f"{'so ' * number}{MARK if number == 9 + 2 * rank else '.'}" for number in range(12)]
    asked = {"train": questions, "validation": ["who?"], "test": ["how?"]}
    for name, texts in asked.items():
        rows = [json.dumps({"question": text, "answer": "yes"}) for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    line = [o for o in tiny_overrides(tmp_path, teacher_folder, marked) if not o.startswith("task")]
    line += [*ALIKE, *TOGETHER, "task=jsonl", f"task.path={tmp_path / 'train.jsonl'}", "loss=[answer]"]
    line += [f"task.{name}_path={tmp_path / name}.jsonl" for name in ("validation", "test")]
    line += ["prompt.num_shots=0", "order=short_first", "checkpoint_every=1", "trainer.max_steps=9"]
    codes, told = zip(*run_ranks(tmp_path, "marked", line, line), strict=True)
    assert codes == (6, 6), told
    assert content_id(questions[9 + 2 * rank]) in told[rank]
    assert "is nan at step 2 on the examples those of another process" in told[1 - rank]
    newest = Folder(tmp_path, "marked", []).checkpoints()[-1].with_suffix(".ckpt")
    assert step_of(newest) == 2
    state = torch.load(newest, weights_only=True)["state_dict"]
    mark = load_file(marked / "model.safetensors")["model.embed_tokens.weight"].isnan()
    assert mark.any()
    for name, value in state.items():
        assert torch.equal(value.isnan(), mark if "embed_tokens" in name else torch.zeros_like(value).bool()), name


TOLD = """
from distill import train
from distill.app.command import command
work = train.main
def main(given):
    accuracy = work(given)
    print(f"GAVE {accuracy}\\n", end="")  # in one piece, beside the other process
    return accuracy
train.main = main
command("train", main)
"""


@pytest.mark.enable_socket
def test_torchrun_gives_every_process_the_same_accuracy_and_one_folder(root: Path, overrides: list[str]) -> None:
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
from distill import train
from distill.app.command import command
from distill.training import job
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
work = job.fit
def fit(*given):
    resource.setrlimit(resource.RLIMIT_AS, ((used + 300_000) * 1024, -1))
    return work(*given)
job.fit = fit
command("train", train.main)
"""


def test_a_full_memory_is_told_with_what_to_make_smaller(root: Path, overrides: list[str]) -> None:
    more = ["batch_size=4096", "microbatch_size=4096", "trainer.max_steps=2", "task.examples.num_unlabelled=3000"]
    more += ["loss=[answer]", f"hydra.run.dir={root / 'runs' / 'memory'}", "task.examples.num_labelled=4000"]
    line = [sys.executable, "-c", SHORT_OF_MEMORY, *overrides, *more]
    code, said = finished(launch(root, line))
    assert code == 7, said
    assert "microbatch_size=4096" in said
    assert "Traceback" not in said


SHORT_OF_DISK = """
import resource
from distill import train
from distill.app.command import command
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, -1))
command("train", train.main)
"""


def test_a_full_disk_leaves_no_part_of_a_checkpoint(root: Path, overrides: list[str]) -> None:
    folder = root / "runs" / "full"
    line = [sys.executable, "-c", SHORT_OF_DISK, *overrides, f"hydra.run.dir={folder}"]
    code, said = finished(launch(root, line))
    assert code == 4, said
    assert "step-00000010.ckpt" in said
    assert "Traceback" not in said
    assert not [path for path in folder.rglob("*") if "step-" in path.name]


SOAK = """
import gc, json, os
from pathlib import Path
from lightning.pytorch.callbacks import Callback
from distill import train
from distill.app.command import command
class Looks(Callback):
    most = 0
    def on_train_batch_end(self, trainer, *_):
        self.most = max(self.most, len([*Path(os.environ["LOOKED_AT"]).glob("*.ckpt")]))
        if trainer.global_step in (500, 2000):
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            found = {"descriptors": len(os.listdir("/proc/self/fd")), "threads": len(os.listdir("/proc/self/task"))}
            found |= {"bytes": pages * os.sysconf("SC_PAGESIZE"), "checkpoints": self.most}
            print("LOOK", json.dumps(found), flush=True)
from distill.training import job
arrange = job.arrange
def looked_at(*given):
    training = arrange(*given)
    training.trainer.callbacks.append(Looks())
    return training
job.arrange = looked_at
command("train", train.main)
"""


def test_two_thousand_steps_leave_memory_files_and_threads_as_they_were(root: Path, overrides: list[str]) -> None:
    folder = root / "runs" / "soak"
    line = [sys.executable, "-c", SOAK, *overrides, "trainer.max_steps=2000", f"hydra.run.dir={folder}"]
    line += ["checkpoint_every=100", "validate_every=100"]
    code, said = finished(launch(root, line, LOOKED_AT=str(folder / "checkpoints")))
    assert code == 0, said
    early, late = (json.loads(text[5:]) for text in said.splitlines() if text.startswith("LOOK "))
    assert late["descriptors"] == early["descriptors"]
    assert late["threads"] == early["threads"]
    assert early["checkpoints"] == late["checkpoints"] == 2
    # A checkpoint has 0.5 MB, and 15 are made between the looks; a step that leaves 3 kB would be seen as well.
    assert late["bytes"] - early["bytes"] < 4_000_000


class Broken(BaseHTTPRequestHandler):
    """Answers everything with an error of its own."""

    def fail(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_error(500)

    do_GET = do_POST = do_PUT = fail

    def log_message(self, *_: object) -> None:
        """Nobody is told."""


@pytest.fixture
def broken() -> Iterator[int]:
    """A port on which every request fails."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Broken) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.fixture
def deaf() -> int:
    """A port on which nobody answers."""
    return free_port()


@pytest.mark.enable_socket
@pytest.mark.parametrize("server", ["deaf", "broken"])
def test_a_tracker_that_cannot_be_reached_stops_no_run(
    server: str, root: Path, overrides: list[str], request: pytest.FixtureRequest
) -> None:
    folder, url = root / "runs" / f"untracked-{server}", f"http://127.0.0.1:{request.getfixturevalue(server)}"
    told = {"WANDB_BASE_URL": url, "WANDB_API_KEY": "0123456789" * 4, "WANDB_MODE": "online"}
    line = [sys.executable, "-m", "distill.train", *overrides, "trainer.max_steps=2", "tracking=wandb"]
    line += [f"hydra.run.dir={folder}"]
    code, said = finished(launch(root, line, **told))
    assert code == 0, said
    assert "cannot be reached" in said
    (offline,) = (folder / "wandb").glob("offline-run-*")
    assert len(list(offline.glob("*.wandb"))) == 1
    assert json.loads((folder / "run.json").read_text())["tracking"] == {
        "mode": "offline",
        "where": str(offline),
        "upload": f"wandb sync {offline}",
    }
    assert (folder / "results.json").is_file()
    assert f"wandb sync {offline}" in said
