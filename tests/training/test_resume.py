"""Law 12, resumed = unbroken: killed, asked to stop or damaged anywhere, a run ends with the unbroken one's weights."""

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
from distill.lessons.curriculum import prepare, teach
from distill.records import Batch
from distill.students.causal_lm import open_student
from distill.training import checkpoints as checkpoints_of
from distill.training.checkpoints import checked, newest
from distill.training.fit import arrange, fit
from tests.conftest import WHOLE_STUDENT, compose, make_model, tiny_overrides

# Lightning sees that the loader has no state; it needs none, its order being a function of the steps that are done.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")]
STEPS = 8  # of 4 examples of 6: some steps hold the end of one epoch and the beginning of the next
BRIEF = ["loss=[answer,kl,rationale]", "batch_size=4", f"trainer.max_steps={STEPS}", "trainer.log_every_n_steps=1"]
BRIEF += ["validate_every=3", "checkpoint_every=1", "optim.optimizer.lr=0.01", "optim.schedule.num_warmup_steps=2"]
WAYS = {
    "plain": [],
    "accumulated": ["microbatch_size=2"],
    "workers": ["num_workers=2"],
    "tokens": ["batch_unit=tokens", "batch_size=240", "microbatch_size=120"],
    "graded": ["order=short_first"],
    "averaged": ["callback=[ema]", "callback.ema.update_starting_at_step=2", "optim=adamw_cosine"],
}


@pytest.fixture(scope="module")
def dropping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with dropout: where chance is not the same again, its weights are not either."""
    return make_model(tmp_path_factory.mktemp("dropping"), seed=5, attention_dropout=0.3)


class Run:
    """A run in this process, and what it was trained on."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.job = prepare(compose(*overrides), folder)
        torch.manual_seed(int(folder.stat().st_ino) if folder.exists() else 1)  # what is drawn before must not matter
        self.student = open_student(self.job.student_folder, **WHOLE_STUDENT)
        self.training = arrange(self.job, teach(self.job), self.student, [])
        self.seen: list[tuple[int, tuple[str, ...]]] = []
        module, step = self.training.module, self.training.module.training_step

        def noted(batch: Batch) -> Tensor:
            self.seen.append((module.global_step, batch.example_ids))
            return step(batch)

        module.training_step = noted  # type: ignore[method-assign]

    def fit(self) -> dict[str, Tensor]:
        """Train, and give the weights."""
        fit(self.job, self.training)
        return {name: value.clone() for name, value in self.student.state_dict().items()}

    def logged(self, since: int) -> list[dict[str, str]]:
        """The learning curve from a step on."""
        with (self.job.run_dir / "metrics.csv").open(newline="") as file:
            rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
        return [row for row in rows if int(row["step"]) >= since]


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def taken(whole: Path, to: Path, steps: Sequence[int]) -> None:
    """The checkpoints of some steps, in the folder of another run."""
    (to / "checkpoints").mkdir(parents=True)
    for step in steps:
        for file in (whole / "checkpoints").glob(f"step-{step:08d}.*"):
            shutil.copy(file, to / "checkpoints" / file.name)


@pytest.mark.parametrize("way", WAYS)
def test_a_run_interrupted_at_any_step_ends_with_the_uninterrupted_weights(
    way: str, tmp_path: Path, teacher_folder: Path, dropping: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints_of, "_NUM_KEPT", STEPS + 1)
    overrides = [*tiny_overrides(tmp_path, teacher_folder, dropping), *BRIEF, *WAYS[way]]
    whole = Run(tmp_path / "whole", *overrides)
    weights = whole.fit()
    saved = sorted(int(path.stem[-8:]) for path in (tmp_path / "whole" / "checkpoints").glob("*.ckpt"))
    assert saved == [*range(1, STEPS + 1)]
    for step in saved:
        taken(tmp_path / "whole", tmp_path / f"from-{step}", [step])
        resumed = Run(tmp_path / f"from-{step}", *overrides)
        assert same(resumed.fit(), weights), step
        assert resumed.seen == [each for each in whole.seen if each[0] >= step]
        if step < STEPS:
            assert resumed.logged(0) == whole.logged(step)


def test_a_run_resumes_with_another_number_of_microbatches(
    tmp_path: Path, teacher_folder: Path, student_folder: Path
) -> None:
    overrides = [*tiny_overrides(tmp_path, teacher_folder, student_folder), *BRIEF]
    weights = Run(tmp_path / "whole", *overrides).fit()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints_of, "_NUM_KEPT", STEPS + 1)
        Run(tmp_path / "small", *overrides, "microbatch_size=1").fit()
    taken(tmp_path / "small", tmp_path / "large", [3])
    large = Run(tmp_path / "large", *overrides, "microbatch_size=2")
    found = large.fit()
    assert [step for step, _ in large.seen] == [step for step in range(3, STEPS) for _ in range(2)]
    for name, value in weights.items():
        assert torch.allclose(found[name], value, rtol=0, atol=1e-5), name


OTHERS = {
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
def half(
    tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path
) -> tuple[Path, list[str]]:
    """A run with checkpoints, and its overrides."""
    root = tmp_path_factory.mktemp("half")
    overrides = [*tiny_overrides(root, teacher_folder, student_folder), *BRIEF, "trainer.max_steps=2"]
    Run(root / "run", *overrides).fit()
    return root, overrides


@pytest.mark.parametrize("other", OTHERS)
def test_resuming_another_run_is_refused_with_the_differences(other: str, half: tuple[Path, list[str]]) -> None:
    root, overrides = half
    job = prepare(compose(*overrides, other), root / "run")
    keep = [0] if "keep_layers" in other else None
    student = open_student(job.student_folder, **WHOLE_STUDENT | {"keep_layers": keep})
    training = arrange(job, teach(job), student, [])
    with pytest.raises(ConfigError, match=OTHERS[other]) as raised:
        fit(job, training)
    assert "resume=never" in str(raised.value)


def test_more_steps_and_other_logging_may_differ_when_resuming(half: tuple[Path, list[str]], tmp_path: Path) -> None:
    root, overrides = half
    shutil.copytree(root / "run", tmp_path / "run")
    more = Run(tmp_path / "run", *overrides, "trainer.max_steps=4", "trainer.log_every_n_steps=2", "validate_every=1")
    more.fit()
    assert [step for step, _ in more.seen] == [2, 3]


def test_resume_never_starts_over(half: tuple[Path, list[str]], tmp_path: Path) -> None:
    root, overrides = half
    shutil.copytree(root / "run", tmp_path / "run")
    anew = Run(tmp_path / "run", *overrides, "resume=never")
    anew.fit()
    assert [step for step, _ in anew.seen] == [0, 1]


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "gone": lambda path: path.unlink(),
    "a bit": lambda path: path.write_bytes(flipped(path.read_bytes())),
}


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("suffix", [".ckpt", ".json"])
def test_a_damaged_checkpoint_is_skipped(
    suffix: str, damage: str, half: tuple[Path, list[str]], tmp_path: Path
) -> None:
    root, _ = half
    folder, said = tmp_path / "checkpoints", list[str]()
    shutil.copytree(root / "run" / "checkpoints", folder)
    identity = json.loads((folder / "step-00000002.json").read_text())["identity"]
    assert newest(folder, identity, said.append) == folder / "step-00000002.ckpt"
    damaged = folder / f"step-00000002{suffix}"
    DAMAGES[damage](damaged)
    if (suffix, damage) == (".json", "a bit"):
        with contextlib.suppress(ConfigError):  # where the bit is one of the identity's, it is another run's
            assert newest(folder, identity, said.append) == folder / "step-00000001.ckpt"
        return
    assert newest(folder, identity, said.append) == folder / "step-00000001.ckpt"
    assert not checked(folder / "step-00000002.ckpt", identity)


@pytest.fixture
def watching() -> Iterator[None]:
    """This process watches for signals; as it was, afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    preemption.watch()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("microbatch", [0, 3, 4, 11])
def test_a_signal_stops_a_run_between_two_steps_without_loss(
    number: signal.Signals,
    microbatch: int,
    tmp_path: Path,
    teacher_folder: Path,
    student_folder: Path,
    watching: None,
) -> None:
    overrides = [*tiny_overrides(tmp_path, teacher_folder, student_folder), *BRIEF, "microbatch_size=2"]
    overrides += ["checkpoint_every=1000", "validate_every=1000"]
    whole = Run(tmp_path / "whole", *overrides)
    weights = whole.fit()
    broken = Run(tmp_path / "broken", *overrides)
    step = broken.training.module.training_step

    def struck(batch: Batch) -> Tensor:
        if len(broken.seen) == microbatch:
            os.kill(os.getpid(), number)
        return step(batch)

    broken.training.module.training_step = struck  # type: ignore[method-assign]
    with pytest.raises(PreemptedError, match=f"after step {microbatch // 2 + 1}"):
        broken.fit()
    preemption.watch()
    resumed = Run(tmp_path / "broken", *overrides)
    assert same(resumed.fit(), weights)
    assert [*broken.seen, *resumed.seen] == whole.seen
    assert resumed.logged(0) == whole.logged(0)
