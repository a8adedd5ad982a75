"""Students sharded over two real processes, which communicate by gloo."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import tiny_overrides
from tests.training.conftest import RunFolder, launch, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.enable_socket]


STEPS = ["batch_size=4", "trainer.max_steps=6", "checkpoint_every=2", "validate_every=3", "trainer.log_every_n_steps=1"]
STEPS += [
    "evaluate_before=false",
    "num_samples=0",
    "preflight=false",
    "microbatch_size=2",
    "optim.schedule.num_warmup_steps=0",
]
STEPS += [
    "optim.optimizer.lr=0.01",
    "+optim.optimizer.eps=0.01",
]  # with the default eps a rounding error would make a full Adam step
SHARDED = ["trainer=fsdp2", "trainer.devices=2"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharding")


@pytest.fixture(scope="module")
def overrides(root: Path, teacher_folder: Path, student_folder: Path) -> list[str]:
    losses = [
        "loss=[answer,kl,rationale]",
        "loss.answer.weight=0.1",
        "loss.rationale.weight=0.03",
    ]  # rounding stays below eps
    return [*tiny_overrides(root, teacher_folder, student_folder), *STEPS, *losses]


def finished_run(root: Path, name: str, overrides: Sequence[str]) -> RunFolder:
    folder = RunFolder(root, name, overrides)
    code, output = wait_for(folder.start())
    assert code == 0, output
    assert output.count("training on ") == 1  # only the first process prints
    return folder


def assert_same(left: RunFolder, right: RunFolder) -> None:
    other_weights = right.weights()
    assert left.weights().keys() == other_weights.keys()
    for name, value in left.weights().items():
        assert (value - other_weights[name]).abs().max() <= 1e-5, name


@pytest.mark.parametrize(
    "more",
    [[], ["student.freeze=[embed_tokens]"], ["student.gradient_checkpointing=true", "batch_size=8"]],
    ids=["all", "frozen", "recomputed"],
)
def test_a_sharded_student_equals_that_of_a_single_process(
    more: list[str], root: Path, overrides: list[str], request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.id
    single = finished_run(root, f"alone-{name}", [*overrides, *more])
    sharded = finished_run(root, f"together-{name}", [*overrides, *more, *SHARDED])
    assert_same(sharded, single)
    left, right = (json.loads((folder.path / "results.json").read_text())["rows"] for folder in (sharded, single))
    assert left["student"]["accuracy"] == right["student"]["accuracy"]


def test_a_run_resumes_sharded_or_whole_with_any_number_of_processes(root: Path, overrides: list[str]) -> None:
    long_run = [*overrides, "validate_every=1000", "checkpoint_every=10", "optim.schedule.num_training_steps=1000"]
    resumed, steps = RunFolder(root, "broken", long_run), [0]
    for more in ([], SHARDED, SHARDED):
        process = resumed.start_and_wait(*more)
        process.send_signal(signal.SIGUSR1)
        code, output = wait_for(process)
        assert code == 85, output
        assert ("resuming from" in output) == (len(steps) > 1), output
        steps.append(int(resumed.checkpoints()[-1].stem.removeprefix("step-")))
    assert steps == sorted(set(steps))
    end = resumed.end_soon()
    code, output = wait_for(resumed.start(end))
    assert code == 0, output
    assert "resuming from" in output
    assert_same(resumed, finished_run(root, "unbroken", [*long_run, end]))


PRINT_SHARD_SIZES = """
import torch
from distill import train
from distill.app.command import command
from distill.training.checkpoints import Checkpoints
end = Checkpoints.on_train_end
def print_sizes(self, trainer, module):
    optimizer = trainer.optimizers[0]
    weights = optimizer.param_groups[0]["params"]
    states = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    kept = [sum(part.to_local().numel() for part in parts) for parts in (weights, states)]
    words = ["SHARD", str(sum(weight.numel() for weight in weights)), *map(str, kept)]
    print(" ".join(words) + "\\n", end="", flush=True)  # a single write, so that lines of two processes do not mix
    end(self, trainer, module)
Checkpoints.on_train_end = print_sizes
command("train", train.main)
"""


def test_each_process_holds_its_shard_of_weights_and_optimizer_state(root: Path, overrides: list[str]) -> None:
    (root / "print_shard_sizes.py").write_text(PRINT_SHARD_SIZES)
    line = [
        sys.executable,
        str(root / "print_shard_sizes.py"),
        *overrides,
        *SHARDED,
        f"hydra.run.dir={root / 'runs' / 'held'}",
    ]
    code, output = wait_for(launch(root, line))
    assert code == 0, output
    sizes = [
        [int(word) for word in output_line.split()[1:]]
        for output_line in output.splitlines()
        if output_line.startswith("SHARD")
    ]
    assert len(sizes) == 2
    for total, weights, states in sizes:
        assert weights == total / 2
        assert states == 2 * weights  # AdamW's two moments


@pytest.mark.parametrize(
    ("override", "setting"), [("student.compile=true", "student.compile"), ("callback=[ema]", "callback.ema")]
)
def test_settings_that_sharding_does_not_support_are_refused(
    override: str, setting: str, root: Path, overrides: list[str]
) -> None:
    code, output = wait_for(RunFolder(root, "refused", [*overrides, *SHARDED, override]).start())
    assert code == 2, output
    assert setting in output
    assert "fsdp2" in output
