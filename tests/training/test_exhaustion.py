"""Runs without enough memory or disk, long runs, and runs whose tracker is unreachable."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.training.conftest import free_port, launch, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


LIMITED_MEMORY = """
import resource, sys
from distill import train
from distill.app.command import command
from distill.training import job
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
original_fit = job.fit
def fit(*arguments):
    resource.setrlimit(resource.RLIMIT_AS, ((used + 300_000) * 1024, -1))
    return original_fit(*arguments)
job.fit = fit
command("train", train.main)
"""


def test_out_of_memory_names_the_settings_to_reduce(root: Path, overrides: list[str]) -> None:
    more = ["batch_size=4096", "microbatch_size=4096", "trainer.max_steps=2", "task.examples.num_unlabelled=3000"]
    more += ["loss=[answer]", f"hydra.run.dir={root / 'runs' / 'memory'}", "task.examples.num_labelled=4000"]
    line = [sys.executable, "-c", LIMITED_MEMORY, *overrides, *more]
    code, output = wait_for(launch(root, line))
    assert code == 7, output
    assert "microbatch_size=4096" in output
    assert "Traceback" not in output


LIMITED_DISK = """
import resource
from distill import train
from distill.app.command import command
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, -1))
command("train", train.main)
"""


def test_a_full_disk_leaves_no_partial_checkpoint(root: Path, overrides: list[str]) -> None:
    folder = root / "runs" / "full"
    line = [sys.executable, "-c", LIMITED_DISK, *overrides, f"hydra.run.dir={folder}"]
    code, output = wait_for(launch(root, line))
    assert code == 4, output
    assert "step-00000010.ckpt" in output
    assert "Traceback" not in output
    assert not [path for path in folder.rglob("*") if "step-" in path.name]


RECORD_RESOURCES = """
import gc, json, os
from pathlib import Path
from lightning.pytorch.callbacks import Callback
from distill import train
from distill.app.command import command
class RecordResources(Callback):
    max_checkpoints = 0
    def on_train_batch_end(self, trainer, *_):
        self.max_checkpoints = max(self.max_checkpoints, len([*Path(os.environ["CHECKPOINTS"]).glob("*.ckpt")]))
        if trainer.global_step in (500, 2000):
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            usage = {"descriptors": len(os.listdir("/proc/self/fd")), "threads": len(os.listdir("/proc/self/task"))}
            usage |= {"bytes": pages * os.sysconf("SC_PAGESIZE"), "checkpoints": self.max_checkpoints}
            print("USAGE", json.dumps(usage), flush=True)
from distill.training import job
build_training = job.build_training
def recording(*arguments):
    training = build_training(*arguments)
    training.trainer.callbacks.append(RecordResources())
    return training
job.build_training = recording
command("train", train.main)
"""


def test_two_thousand_steps_leak_no_memory_files_or_threads(root: Path, overrides: list[str]) -> None:
    folder = root / "runs" / "soak"
    line = [sys.executable, "-c", RECORD_RESOURCES, *overrides, "trainer.max_steps=2000", f"hydra.run.dir={folder}"]
    line += ["checkpoint_every=100", "validate_every=100"]
    code, output = wait_for(launch(root, line, CHECKPOINTS=str(folder / "checkpoints")))
    assert code == 0, output
    early, late = (json.loads(line.removeprefix("USAGE ")) for line in output.splitlines() if line.startswith("USAGE "))
    assert late["descriptors"] == early["descriptors"]
    assert late["threads"] == early["threads"]
    assert early["checkpoints"] == late["checkpoints"] == 2
    # A checkpoint has 0.5 MB, and 15 are made in between; a leak of 3 kB per step would also exceed the limit.
    assert late["bytes"] - early["bytes"] < 4_000_000


@pytest.fixture
def closed_port() -> int:
    """A port on which no server listens."""
    return free_port()


@pytest.mark.enable_socket
@pytest.mark.parametrize("server", ["closed_port", "failing_server"])
def test_an_unreachable_tracker_does_not_stop_a_run(
    server: str, root: Path, overrides: list[str], request: pytest.FixtureRequest
) -> None:
    folder, url = root / "runs" / f"untracked-{server}", f"http://127.0.0.1:{request.getfixturevalue(server)}"
    variables = {"WANDB_BASE_URL": url, "WANDB_API_KEY": "0123456789" * 4, "WANDB_MODE": "online"}
    line = [sys.executable, "-m", "distill.train", *overrides, "trainer.max_steps=2", "tracking=wandb"]
    line += [f"hydra.run.dir={folder}"]
    code, output = wait_for(launch(root, line, **variables))
    assert code == 0, output
    assert "cannot reach W&B" in output
    (offline,) = (folder / "wandb").glob("offline-run-*")
    assert len(list(offline.glob("*.wandb"))) == 1
    assert json.loads((folder / "run.json").read_text())["tracking"] == {
        "mode": "offline",
        "where": str(offline),
        "upload": f"wandb sync {offline}",
    }
    assert (folder / "results.json").is_file()
    assert f"wandb sync {offline}" in output
