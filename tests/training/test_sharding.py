"""Students that are shared out over processes: two real ones, which talk by gloo."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.conftest import tiny_overrides
from tests.training.conftest import Folder, finished, launch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.enable_socket]


STEPS = ["batch_size=4", "trainer.max_steps=6", "checkpoint_every=2", "validate_every=3", "trainer.log_every_n_steps=1"]
STEPS += [
    "evaluate_before=false",
    "num_samples=0",
    "preflight=false",
    "microbatch_size=2",
    "optim.schedule.num_warmup_steps=0",
]
STEPS += ["optim.optimizer.lr=0.01", "+optim.optimizer.eps=0.01"]  # by Adam alone a rounding of nothing would be a step
SHARDED = ["trainer=fsdp2", "trainer.devices=2"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharding")


@pytest.fixture(scope="module")
def overrides(root: Path, teacher_folder: Path, student_folder: Path) -> list[str]:
    return [*tiny_overrides(root, teacher_folder, student_folder), *STEPS, "loss=[answer,kl,rationale]"]


def done(root: Path, name: str, overrides: Sequence[str]) -> Folder:
    folder = Folder(root, name, overrides)
    code, said = finished(folder.start())
    assert code == 0, said
    assert said.count("training on ") == 1  # only the first process speaks
    return folder


def assert_same(left: Folder, right: Folder) -> None:
    theirs = right.weights()
    assert left.weights().keys() == theirs.keys()
    for name, value in left.weights().items():
        assert torch.allclose(value, theirs[name], rtol=0, atol=1e-5), name


@pytest.mark.parametrize(
    "more",
    [[], ["student.freeze=[embed_tokens]"], ["student.gradient_checkpointing=true", "batch_size=8"]],
    ids=["all", "frozen", "recomputed"],
)
def test_a_sharded_student_equals_that_of_a_single_process(
    more: list[str], root: Path, overrides: list[str], request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.id
    alone = done(root, f"alone-{name}", [*overrides, *more])
    together = done(root, f"together-{name}", [*overrides, *more, *SHARDED])
    assert_same(together, alone)
    left, right = (json.loads((folder.path / "results.json").read_text())["rows"] for folder in (together, alone))
    assert left["student"]["accuracy"] == right["student"]["accuracy"]


def test_a_run_resumes_sharded_or_whole_with_any_number_of_processes(root: Path, overrides: list[str]) -> None:
    long = [*overrides, "validate_every=1000", "checkpoint_every=10", "optim.schedule.num_training_steps=1000"]
    folder, steps = Folder(root, "broken", long), [0]
    for more in ([], SHARDED, SHARDED):
        process = folder.start_and_wait(*more)
        process.send_signal(signal.SIGUSR1)
        code, said = finished(process)
        assert code == 85, said
        assert ("resuming from" in said) == (len(steps) > 1), said
        steps.append(int(folder.checkpoints()[-1].stem.removeprefix("step-")))
    assert steps == sorted(set(steps))
    end = folder.soon()
    code, said = finished(folder.start(end))
    assert code == 0, said
    assert "resuming from" in said
    assert_same(folder, done(root, "unbroken", [*long, end]))


HELD = """
import torch
from distill import train
from distill.app.command import command
from distill.training.checkpoints import Checkpoints
end = Checkpoints.on_train_end
def told(self, trainer, module):
    optimizer = trainer.optimizers[0]
    weights = optimizer.param_groups[0]["params"]
    states = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    kept = [sum(part.to_local().numel() for part in parts) for parts in (weights, states)]
    words = ["HELD", str(sum(weight.numel() for weight in weights)), *map(str, kept)]
    print(" ".join(words) + "\\n", end="", flush=True)  # in one piece, beside the other process
    end(self, trainer, module)
Checkpoints.on_train_end = told
command("train", train.main)
"""


def test_each_process_holds_its_shard_of_weights_and_optimizer_state(root: Path, overrides: list[str]) -> None:
    (root / "held.py").write_text(HELD)
    line = [sys.executable, str(root / "held.py"), *overrides, *SHARDED, f"hydra.run.dir={root / 'runs' / 'held'}"]
    code, said = finished(launch(root, line))
    assert code == 0, said
    held = [[int(word) for word in text.split()[1:]] for text in said.splitlines() if text.startswith("HELD")]
    assert len(held) == 2
    for total, weights, states in held:
        assert weights == total / 2
        assert states == 2 * weights  # AdamW's two moments


@pytest.mark.parametrize(
    ("wrong", "told"), [("student.compile=true", "student.compile"), ("callback=[ema]", "callback.ema")]
)
def test_settings_that_sharding_does_not_support_are_refused(
    wrong: str, told: str, root: Path, overrides: list[str]
) -> None:
    code, said = finished(Folder(root, "refused", [*overrides, *SHARDED, wrong]).start())
    assert code == 2, said
    assert told in said
    assert "fsdp2" in said
