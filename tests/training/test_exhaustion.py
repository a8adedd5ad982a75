"""What may happen to a run from outside: signals, kills, lost processes, full memory and disks, no tracker."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.training.conftest import finished, free_port, launch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


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


def test_out_of_memory_names_the_settings_to_reduce(root: Path, overrides: list[str]) -> None:
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


def test_a_full_disk_leaves_no_partial_checkpoint(root: Path, overrides: list[str]) -> None:
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


def test_two_thousand_steps_leak_no_memory_files_or_threads(root: Path, overrides: list[str]) -> None:
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


@pytest.fixture
def deaf() -> int:
    """A port on which nobody answers."""
    return free_port()


@pytest.mark.enable_socket
@pytest.mark.parametrize("server", ["deaf", "broken"])
def test_an_unreachable_tracker_does_not_stop_a_run(
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
