"""Law 12, resumed = unbroken: after any interruption or damage a run ends with the uninterrupted weights."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.app import preemption
from distill.errors import ConfigError, PreemptedError
from distill.lessons.curriculum import build_curriculum, prepare
from distill.records import Batch
from distill.students.causal_lm import open_student
from distill.training import checkpoints as checkpoints_module
from distill.training.checkpoints import checked, newest
from distill.training.fit import build_training, fit, open_job_student
from tests.cases import KINDS, WAYS, case_overrides
from tests.conftest import WHOLE_STUDENT, compose, make_model, reviews, tiny_overrides
from tests.students.encoders import make_encoder

# Lightning warns that the loader has no state; it needs none, as its order is a function of the step.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")]
STEPS = 8  # of 4 of the 6 examples, so that some steps span two epochs
SHORT_RUN = ["loss=[answer,kl,rationale]", "batch_size=4", f"trainer.max_steps={STEPS}", "trainer.log_every_n_steps=1"]
SHORT_RUN += ["validate_every=3", "checkpoint_every=1", "optim.optimizer.lr=0.01", "optim.schedule.num_warmup_steps=2"]
VARIANTS = {
    "plain": [],
    "accumulated": ["microbatch_size=2"],
    "workers": ["num_workers=2"],
    "tokens": ["batch_unit=tokens", "batch_size=240", "microbatch_size=120"],
    "graded": ["order=short_first"],
    "averaged": ["callback=[ema]", "callback.ema.update_starting_at_step=2", "optim=adamw_cosine"],
}


@pytest.fixture(scope="module")
def student_with_dropout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with dropout, whose weights differ if random states are not restored."""
    return make_model(tmp_path_factory.mktemp("dropping"), seed=5, attention_dropout=0.3)


class Run:
    """A run in this process, with the example ids of every step."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.job = prepare(compose(*overrides), folder)
        torch.manual_seed(int(folder.stat().st_ino) if folder.exists() else 1)  # earlier random draws must not matter
        self.student = open_job_student(self.job)
        self.training = build_training(self.job, build_curriculum(self.job), self.student, [])
        self.steps_seen: list[tuple[int, tuple[str, ...]]] = []
        module, training_step = self.training.module, self.training.module.training_step

        def recording_step(batch: Batch) -> Tensor:
            self.steps_seen.append((module.global_step, batch.example_ids))
            return training_step(batch)

        module.training_step = recording_step  # type: ignore[method-assign]

    def fit(self) -> dict[str, Tensor]:
        """Train, and return the weights."""
        fit(self.job, self.training)
        return {name: value.clone() for name, value in self.student.state_dict().items()}

    def logged(self, since: int) -> list[dict[str, str]]:
        """The rows of the learning curve from a step on."""
        with (self.job.run_dir / "metrics.csv").open(newline="") as file:
            rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
        return [row for row in rows if int(row["step"]) >= since]


def weights_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def copy_checkpoints(run_dir: Path, target_dir: Path, steps: Sequence[int]) -> None:
    """Copy the checkpoints of some steps into the folder of another run."""
    (target_dir / "checkpoints").mkdir(parents=True)
    for step in steps:
        for file in (run_dir / "checkpoints").glob(f"step-{step:08d}.*"):
            shutil.copy(file, target_dir / "checkpoints" / file.name)


def classes(root: Path) -> list[str]:
    """Overrides for an encoder with dropout, whose head learns faster than its body."""
    encoder = make_encoder(root / "encoder", hidden_dropout_prob=0.3)
    sizes = [f"task.examples.num_{part}=6" for part in ("labelled", "unlabelled", "validation")]
    student = ["student=classifier", f"student.model={encoder}", "loss=[answer,kl]", "teacher.calibrate=5"]
    return [*reviews(root), *sizes, *student]


@pytest.mark.parametrize("variant", [*VARIANTS, "classes", *list(KINDS)[1:], *WAYS])
def test_a_run_interrupted_at_any_step_ends_with_the_uninterrupted_weights(
    variant: str, tmp_path: Path, teacher_folder: Path, student_with_dropout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints_module, "NUM_KEPT", STEPS + 1)
    models = teacher_folder, student_with_dropout
    own = classes(tmp_path) if variant == "classes" else VARIANTS.get(variant)
    own = case_overrides(variant, tmp_path, *models) if own is None else own
    overrides = [*tiny_overrides(tmp_path, *models), *SHORT_RUN, *own]
    uninterrupted = Run(tmp_path / "whole", *overrides)
    weights = uninterrupted.fit()
    saved = sorted(int(path.stem[-8:]) for path in (tmp_path / "whole" / "checkpoints").glob("*.ckpt"))
    assert saved == [*range(1, STEPS + 1)]
    for step in saved:
        copy_checkpoints(tmp_path / "whole", tmp_path / f"from-{step}", [step])
        resumed = Run(tmp_path / f"from-{step}", *overrides)
        assert weights_equal(resumed.fit(), weights), step
        assert resumed.steps_seen == [
            step_and_ids for step_and_ids in uninterrupted.steps_seen if step_and_ids[0] >= step
        ]
        if step < STEPS:
            assert resumed.logged(0) == uninterrupted.logged(step)


def test_a_run_resumes_with_another_number_of_microbatches(
    tmp_path: Path, teacher_folder: Path, student_folder: Path
) -> None:
    overrides = [*tiny_overrides(tmp_path, teacher_folder, student_folder), *SHORT_RUN]
    weights = Run(tmp_path / "whole", *overrides).fit()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints_module, "NUM_KEPT", STEPS + 1)
        Run(tmp_path / "small", *overrides, "microbatch_size=1").fit()
    copy_checkpoints(tmp_path / "small", tmp_path / "large", [3])
    resumed = Run(tmp_path / "large", *overrides, "microbatch_size=2")
    actual = resumed.fit()
    assert [step for step, _ in resumed.steps_seen] == [step for step in range(3, STEPS) for _ in range(2)]
    for name, value in weights.items():
        assert torch.allclose(actual[name], value, rtol=0, atol=1e-5), name


CHANGES = {
    "batch_size=6": "batch_size was 4 and is now 6",
    "seed=1": "seed was 0 and is now 1",
    "order=short_first": 'order was "shuffled" and is now "short_first"',
    "loss.kl.weight=0.25": "loss was ",
    "optim.optimizer.lr=0.02": "optimizer was ",
    "task.examples.num_labelled=8": "train was ",
    "task.examples.split_seed=9": "test was ",
    "cache.codec.k=4": "cache was ",
    "student.keep_layers=[0]": "student was ",
}


@pytest.fixture(scope="module")
def interrupted_run(
    tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path
) -> tuple[Path, list[str]]:
    """A run with checkpoints, and its overrides."""
    root = tmp_path_factory.mktemp("half")
    overrides = [*tiny_overrides(root, teacher_folder, student_folder), *SHORT_RUN, "trainer.max_steps=2"]
    Run(root / "run", *overrides).fit()
    return root, overrides


@pytest.mark.parametrize("change", CHANGES)
def test_resuming_another_run_is_refused_with_the_differences(
    change: str, interrupted_run: tuple[Path, list[str]]
) -> None:
    root, overrides = interrupted_run
    job = prepare(compose(*overrides, change), root / "run")
    keep_layers = [0] if "keep_layers" in change else None
    student = open_student(job.student_folder, **WHOLE_STUDENT | {"keep_layers": keep_layers})
    training = build_training(job, build_curriculum(job), student, [])
    with pytest.raises(ConfigError, match=CHANGES[change]) as raised:
        fit(job, training)
    assert "resume=never" in str(raised.value)


def test_more_steps_and_other_logging_may_differ_when_resuming(
    interrupted_run: tuple[Path, list[str]], tmp_path: Path
) -> None:
    root, overrides = interrupted_run
    shutil.copytree(root / "run", tmp_path / "run")
    resumed = Run(
        tmp_path / "run", *overrides, "trainer.max_steps=4", "trainer.log_every_n_steps=2", "validate_every=1"
    )
    resumed.fit()
    assert [step for step, _ in resumed.steps_seen] == [2, 3]


def test_resume_never_starts_over(interrupted_run: tuple[Path, list[str]], tmp_path: Path) -> None:
    root, overrides = interrupted_run
    shutil.copytree(root / "run", tmp_path / "run")
    restarted = Run(tmp_path / "run", *overrides, "resume=never")
    restarted.fit()
    assert [step for step, _ in restarted.steps_seen] == [0, 1]


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "missing": lambda path: path.unlink(),
    "flipped bit": lambda path: path.write_bytes(flip_middle_bit(path.read_bytes())),
}


def flip_middle_bit(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("suffix", [".ckpt", ".json"])
def test_a_damaged_checkpoint_is_skipped(
    suffix: str, damage: str, interrupted_run: tuple[Path, list[str]], tmp_path: Path
) -> None:
    root, _ = interrupted_run
    folder, messages = tmp_path / "checkpoints", list[str]()
    shutil.copytree(root / "run" / "checkpoints", folder)
    identity = json.loads((folder / "step-00000002.json").read_text())["identity"]
    assert newest(folder, identity, messages.append) == folder / "step-00000002.ckpt"
    damaged = folder / f"step-00000002{suffix}"
    DAMAGES[damage](damaged)
    if (suffix, damage) == (".json", "flipped bit"):
        with contextlib.suppress(ConfigError):  # if the bit is in the identity, it is another run
            assert newest(folder, identity, messages.append) == folder / "step-00000001.ckpt"
        return
    assert newest(folder, identity, messages.append) == folder / "step-00000001.ckpt"
    assert not checked(folder / "step-00000002.ckpt", identity)


@pytest.fixture
def signal_watch() -> Iterator[None]:
    """Watch for signals in this process; restore the handlers afterwards."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    preemption.watch()
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("microbatch", [0, 3, 4, 11])
def test_a_signal_stops_a_run_between_two_steps_without_loss(
    number: signal.Signals,
    microbatch: int,
    tmp_path: Path,
    teacher_folder: Path,
    student_folder: Path,
    signal_watch: None,
) -> None:
    overrides = [*tiny_overrides(tmp_path, teacher_folder, student_folder), *SHORT_RUN, "microbatch_size=2"]
    overrides += ["checkpoint_every=1000", "validate_every=1000"]
    uninterrupted = Run(tmp_path / "whole", *overrides)
    weights = uninterrupted.fit()
    interrupted = Run(tmp_path / "broken", *overrides)
    training_step = interrupted.training.module.training_step

    def step_with_signal(batch: Batch) -> Tensor:
        if len(interrupted.steps_seen) == microbatch:
            os.kill(os.getpid(), number)
        return training_step(batch)

    interrupted.training.module.training_step = step_with_signal  # type: ignore[method-assign]
    with pytest.raises(PreemptedError, match=f"after step {microbatch // 2 + 1}"):
        interrupted.fit()
    preemption.watch()
    resumed = Run(tmp_path / "broken", *overrides)
    assert weights_equal(resumed.fit(), weights)
    assert [*interrupted.steps_seen, *resumed.steps_seen] == uninterrupted.steps_seen
    assert resumed.logged(0) == uninterrupted.logged(0)
